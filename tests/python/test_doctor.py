"""`turbokv doctor` on this build, and on copies of it in which one thing is broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from turbokv import native
from turbokv.doctor import TOOLS

# Another native folder can only be given to a fresh process: the library is loaded once.
ELSEWHERE = """
import sys
from pathlib import Path
from turbokv import cli, native
native.PACKAGE = Path(sys.argv.pop(1))
cli.main()
"""


def doctor(native_folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "turbokv"] if native_folder is None else ["-c", ELSEWHERE, str(native_folder.parent)]
    return subprocess.run([sys.executable, *start, "doctor"], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A native folder of links into this build's."""
    folder = tmp_path / "_native"
    folder.mkdir()
    for path in native.native_dir().iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def bad_lines(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.startswith("BAD")]


def test_this_build_is_sound() -> None:
    run = doctor()
    assert run.returncode == 0
    assert bad_lines(run.stdout) == []
    assert run.stderr == ""
    missing = [name for name in (*TOOLS, "libllama", "mini-q8_0.gguf") if not re.search(rf"ok +{name}:", run.stdout)]
    assert missing == []


def test_hooks_and_inserted_lines_are_counted_and_few() -> None:
    report = doctor().stdout
    found = re.search(r"hooks: +(\d+) hooks, (\d+) inserted lines in (\d+) files", report)
    assert found
    hooks, lines, files = map(int, found.groups())
    built = json.loads((native.native_dir() / "turbokv-build.json").read_text())["hooks"]
    assert hooks == len(built) < 25
    assert lines == sum(hook["lines"] for hook in built) < 40
    assert files == len({hook["file"] for hook in built})
    assert [hook["name"] for hook in built if f"  {hook['name']}:" not in report] == []


def test_sound_copy_passes(copy: Path) -> None:
    assert doctor(copy).returncode == 0


def test_missing_tool_is_named(copy: Path) -> None:
    (copy / "llama-bench").unlink()
    run = doctor(copy)
    assert run.returncode == 1
    assert re.findall(r"^BAD\s+([\w-]+):.*missing", run.stdout, re.MULTILINE) == ["llama-bench"]


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 127\n", "no program\n"], ids=["exits", "does-not-execute"])
def test_tool_that_does_not_start_is_named(copy: Path, content: str) -> None:
    (copy / "llama-bench").unlink()
    (copy / "llama-bench").write_text(content)
    (copy / "llama-bench").chmod(0o755)
    run = doctor(copy)
    assert run.returncode == 1
    assert re.findall(r"^BAD\s+([\w-]+):", run.stdout, re.MULTILINE) == ["llama-bench"]


def break_library(folder: Path) -> None:
    (folder / "libllama.so").unlink()
    (folder / "libllama.so").write_bytes(b"no library")


def remove_bindings(folder: Path) -> None:
    (folder / "bindings").unlink()


def remove_build_info(folder: Path) -> None:
    (folder / "turbokv-build.json").unlink()


def cut_build_info(folder: Path) -> None:
    text = (folder / "turbokv-build.json").read_text()
    (folder / "turbokv-build.json").unlink()
    (folder / "turbokv-build.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize("breakage", [break_library, remove_bindings, remove_build_info, cut_build_info])
def test_broken_build_is_a_finding_and_no_traceback(copy: Path, breakage: Callable[[Path], None]) -> None:
    breakage(copy)
    run = doctor(copy)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert str(copy) in "\n".join(bad_lines(run.stdout))
