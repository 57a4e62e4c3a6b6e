"""scripts/generate.py: the committed files are current, and --check notices when they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def generate(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # No .pyc files: an edit of spec.py within the second and of the same length would go unnoticed.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(root / "scripts" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def named(result: subprocess.CompletedProcess[str]) -> set[str]:
    """The files that --check complained about."""
    return {line.split()[1] for line in result.stdout.splitlines()}


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def current(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What generate.py reads and writes, up to date."""
    root = tmp_path_factory.mktemp("current")
    for folder in ("python/turbokv", "ggml-ext/generated", "tests/golden"):
        shutil.copytree(repo / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    (root / "scripts").mkdir()
    shutil.copy(repo / "scripts" / "generate.py", root / "scripts")
    for folder in ("docs", "results"):
        (root / folder).mkdir()
    for file in (
        "README.md",
        "docs/cuda-attention.md",
        "docs/hooks.md",
        "results/README.md",
        "results/runs.jsonl",
        "ggml-ext/apply_hooks.py",
        "ggml-ext/hooks.toml",
    ):
        shutil.copy(repo / file, root / file)
    shutil.copytree(repo / "results" / "cuda-nvidia-h200", root / "results" / "cuda-nvidia-h200")
    assert generate(root).returncode == 0
    return root


@pytest.fixture
def copy(current: Path, tmp_path: Path) -> Path:
    shutil.copytree(current, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_committed_files_are_current(repo: Path) -> None:
    result = generate(repo, "--check")
    assert (result.returncode, result.stdout) == (0, "")


def test_what_was_just_written_is_current(copy: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    for arguments in (["--check"], []):
        result = generate(copy, *arguments)
        assert (result.returncode, result.stdout) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == times


EDITS = {
    "ggml-ext/generated/turbokv-tables.h": ("0.24509418f", "0.24509417f"),
    "README.md": ("| `turbo4` | 4.125", "| `turbo4` | 4.5"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_text_is_named_and_repaired(copy: Path, name: str) -> None:
    good = contents(copy)
    text = (copy / name).read_text()
    assert EDITS[name][0] in text
    (copy / name).write_text(text.replace(*EDITS[name]))

    check = generate(copy, "--check")
    assert (check.returncode, named(check)) == (1, {name})
    assert generate(copy).returncode == 0
    assert contents(copy) == good


@pytest.mark.parametrize("name", ["tests/golden/turbo3.bin", "ggml-ext/generated/turbokv-types.h"])
def test_damaged_or_missing_file_is_named_and_repaired(copy: Path, name: str) -> None:
    good = contents(copy)
    (copy / name).write_bytes(good[name][:-1])
    check = generate(copy, "--check")
    assert (check.returncode, named(check)) == (1, {name})
    (copy / name).unlink()
    check = generate(copy, "--check")
    assert (check.returncode, named(check)) == (1, {name})
    assert generate(copy).returncode == 0
    assert contents(copy) == good


@pytest.mark.parametrize("folder", ["ggml-ext/generated", "tests/golden"])
def test_stray_file_is_named_and_removed(copy: Path, folder: str) -> None:
    good = contents(copy)
    (copy / folder / "turbo9.bin").write_text("left behind\n")
    check = generate(copy, "--check")
    assert (check.returncode, named(check)) == (1, {f"{folder}/turbo9.bin"})
    assert generate(copy).returncode == 0
    assert contents(copy) == good


def test_edited_centroid_makes_its_tables_and_vectors_stale(copy: Path) -> None:
    spec = copy / "python" / "turbokv" / "spec.py"
    text = spec.read_text()
    assert text.count("0.7560053") == 1
    spec.write_text(text.replace("0.7560053", "0.7560153"))

    before = contents(copy)
    check = generate(copy, "--check")
    expected = {"ggml-ext/generated/turbokv-tables.h", "tests/golden/turbo3.bin", "tests/golden/turbo3_64.bin"}
    assert (check.returncode, named(check)) == (1, expected)
    assert contents(copy) == before  # --check only looks

    assert generate(copy).returncode == 0
    assert generate(copy, "--check").returncode == 0
    assert {name for name, content in contents(copy).items() if content != before[name]} == expected


def test_readme_without_markers_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("# turbokv\n")
    result = generate(copy)
    assert result.returncode != 0
    assert "lacks the markers" in result.stderr
    assert (copy / "README.md").read_text() == "# turbokv\n"
