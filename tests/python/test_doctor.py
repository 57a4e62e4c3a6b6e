"""`turbokv doctor` on this build, on copies of it in which one thing is broken, and on other llama.cpp trees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from turbokv import decode_path, doctor, engine, native
from turbokv.cache_type import CachePair
from turbokv.decode_path import Agreement
from turbokv.doctor import Finding
from turbokv.errors import TurbokvError
from turbokv.spec import FAMILIES

# Another native folder can only be given to a fresh process: the library is loaded once.
ELSEWHERE = """
import sys
from pathlib import Path
from turbokv import cli, native
native.PACKAGE = Path(sys.argv.pop(1))
cli.main()
"""

Run = subprocess.CompletedProcess[str]


def turbokv_doctor(*arguments: str | Path, package: Path | None = None) -> Run:
    start = ["-m", "turbokv"] if package is None else ["-c", ELSEWHERE, str(package)]
    command = [sys.executable, *start, "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def on_copy(native_folder: Path) -> Run:
    return turbokv_doctor(package=native_folder.parent)


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
    run = turbokv_doctor()
    assert run.returncode == 0
    assert bad_lines(run.stdout) == []
    assert run.stderr == ""
    tools = native.build_info()["tools"]
    assert {"llama-server", "llama-bench", "llama-perplexity"} < set(tools)
    missing = [name for name in (*tools, "libllama", "mini-q8_0.gguf") if not re.search(rf"ok +{name}:", run.stdout)]
    assert missing == []


def test_hooks_and_inserted_lines_are_counted_and_few() -> None:
    report = turbokv_doctor().stdout
    found = re.search(r"hooks: +(\d+) hooks, (\d+) inserted lines in (\d+) files", report)
    assert found
    hooks, lines, files = map(int, found.groups())
    built = json.loads((native.native_dir() / "turbokv-build.json").read_text())["hooks"]
    assert hooks == len(built)
    assert sum("/ggml-cuda/" not in hook["file"] for hook in built) < 25  # as test_hooks.py
    assert lines == sum(hook["lines"] for hook in built) < 40
    assert files == len({hook["file"] for hook in built})
    assert [hook["name"] for hook in built if f"  {hook['name']}:" not in report] == []


def test_sound_copy_passes(copy: Path) -> None:
    assert on_copy(copy).returncode == 0


def test_missing_tool_is_named(copy: Path) -> None:
    (copy / "llama-bench").unlink()
    run = on_copy(copy)
    assert run.returncode == 1
    assert re.findall(r"^BAD\s+([\w-]+):.*missing", run.stdout, re.MULTILINE) == ["llama-bench"]


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 127\n", "no program\n"], ids=["exits", "does-not-execute"])
def test_tool_that_does_not_start_is_named(copy: Path, content: str) -> None:
    (copy / "llama-bench").unlink()
    (copy / "llama-bench").write_text(content)
    (copy / "llama-bench").chmod(0o755)
    run = on_copy(copy)
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
    run = on_copy(copy)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert str(copy) in "\n".join(bad_lines(run.stdout))


def test_build_info_of_an_older_version_is_a_finding(copy: Path) -> None:
    info = json.loads((copy / "turbokv-build.json").read_text())
    del info["tools"]
    (copy / "turbokv-build.json").unlink()
    (copy / "turbokv-build.json").write_text(json.dumps(info))
    run = on_copy(copy)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    (bad,) = bad_lines(run.stdout)
    assert "older turbokv" in bad and "cmake" in bad


# --- --llama-source

GGML_H = "enum ggml_type {\n    GGML_TYPE_COUNT,\n};\n"
OPS = "static int table[COUNT] = {\nwork();\nwork_more();\nlast();\n"

ENUM = {"name": "enum", "file": "ggml/include/ggml.h", "anchor": "GGML_TYPE_COUNT,", "before": "OURS,"}
ABSENT = {"name": "absent", "file": "src/ops.cpp", "anchor": "static int gone[count] = {", "after": "x"}
TWICE = {"name": "twice", "file": "src/ops.cpp", "anchor": "work", "after": "x"}
NO_FILE = {"name": "no-file", "file": "src/moved.cpp", "anchor": "work", "after": "x"}
ROWS = {"name": "rows", "file": "src/ops.cpp", "anchor": "work_more();", "after": "last();"}
LAST = {"name": "last", "file": "src/ops.cpp", "anchor": "last();", "after": "x"}

Hook = dict[str, str]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A llama.cpp tree in small."""
    for name, text in {"ggml/include/ggml.h": GGML_H, "src/ops.cpp": OPS}.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path / "tree"


def install(place: Path, hooks: list[Hook], repo: Path) -> None:
    """apply_hooks.py, and a hooks.toml of these hooks beside it."""
    place.mkdir(parents=True)
    shutil.copy(repo / "ggml-ext" / "apply_hooks.py", place)
    lines: list[str] = []
    for hook in hooks:
        entry = {**hook, "why": f"why {hook['name']}", "test": "the build"}
        lines += ["[[hook]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    (place / "hooks.toml").write_text("\n".join(lines) + "\n")


Findings = Callable[..., dict[str, Finding]]


@pytest.fixture
def findings(tree: Path, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Findings:
    """What hook_findings() says of the tree for some hooks, by name."""

    def found(*hooks: Hook) -> dict[str, Finding]:
        install(tmp_path / "_native" / "overlay", list(hooks), repo)
        monkeypatch.setattr(native, "PACKAGE", tmp_path)
        return {finding.name: finding for finding in doctor.hook_findings(tree)}

    return found


def test_each_hook_has_a_finding_and_bad_ones_hide_no_others(findings: Findings) -> None:
    found = findings(ENUM, ABSENT, TWICE, NO_FILE, ROWS)
    assert {name: finding.ok for name, finding in found.items()} == {
        "enum": True, "absent": False, "twice": False, "no-file": False, "rows": True, "hooks": False,
    }  # fmt: skip
    assert found["enum"].value == "ggml/include/ggml.h: why enum"
    assert "src/ops.cpp: its anchor is not there" in found["absent"].value
    assert "anchor: static int gone[count] = {" in found["absent"].value
    assert "src/ops.cpp: its anchor occurs 2 times" in found["twice"].value
    assert "src/moved.cpp does not exist" in found["no-file"].value
    assert found["hooks"].value.startswith("2 of 5 apply")


@pytest.mark.parametrize(("hooks", "ok"), [((LAST, ROWS), True), ((ROWS, LAST), False)])
def test_hooks_of_a_file_are_tried_one_after_another(findings: Findings, hooks: tuple[Hook, ...], ok: bool) -> None:
    """The line that `rows` inserts is the anchor of `last` once more."""
    found = findings(*hooks)
    assert found["rows"].ok
    assert found["last"].ok == found["hooks"].ok == ok


def test_hook_that_does_not_apply_leaves_no_line_to_the_next(findings: Findings) -> None:
    found = findings({**ABSENT, "after": "last();"}, LAST)
    assert (found["absent"].ok, found["last"].ok) == (False, True)


@pytest.mark.parametrize("layout", ["wheel", "checkout"])
def test_hooks_are_found_without_a_build_and_the_tree_is_not_written_to(
    tree: Path, tmp_path: Path, repo: Path, layout: str
) -> None:
    package = tmp_path / "python" / "turbokv"
    place = package / "_native" / "overlay" if layout == "wheel" else tmp_path / "ggml-ext"
    install(place, [ENUM, ABSENT, ROWS], repo)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    run = turbokv_doctor("--llama-source", tree, package=package)
    assert (run.returncode, run.stderr) == (1, "")
    assert [line.split(":")[0] for line in run.stdout.splitlines() if not line.startswith(" ")] == [
        "ok  enum", "BAD absent", "ok  rows", "BAD hooks",
    ]  # fmt: skip
    assert re.search(r"^ {30,}anchor: static int gone\[count\] = {$", run.stdout, re.MULTILINE)  # [count] is no markup
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_every_hook_applies_to_the_pinned_llama_cpp(repo: Path) -> None:
    trees = sorted(repo.glob("build/upstream/*/vendor/llama.cpp"))
    if not trees:
        pytest.skip("no llama.cpp under build/upstream: configure the build first")
    run = turbokv_doctor("--llama-source", trees[-1])
    assert run.returncode == 0
    built = [hook["name"] for hook in native.build_info()["hooks"]]
    assert re.findall(r"^ok +([\w-]+):", run.stdout, re.MULTILINE) == [*built, "hooks"]


@pytest.mark.parametrize("place", [".", "absent"])
def test_folder_that_is_no_llama_cpp_is_refused(tmp_path: Path, place: str) -> None:
    run = turbokv_doctor("--llama-source", tmp_path / place)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"turbokv: {tmp_path / place} is no llama.cpp tree")


def test_missing_hooks_are_explained(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "python" / "turbokv")
    with pytest.raises(TurbokvError, match=r"no apply_hooks\.py in .*overlay or .*ggml-ext: install turbokv again"):
        list(doctor.hook_findings(tree))


# --- --deep, with measurements that are made up; test_decode_path.py makes real ones

GOOD, DRIFTED, WRONG = Agreement(0.0, 1.0, 447), Agreement(3e-3, 0.95, 447), Agreement(4e-4, 0.99, 447)


def decode_findings(
    monkeypatch: pytest.MonkeyPatch, measured: dict[str, Agreement], steps: Agreement = GOOD
) -> dict[str, Finding]:
    """By name. `measured` by the type as users write it; the others are good."""

    def measure(_: engine.Model, pair: CachePair, tokens: object, n_threads: int) -> Agreement:
        return measured.get(pair.k, GOOD)

    monkeypatch.setattr(decode_path, "measure", measure)
    monkeypatch.setattr(decode_path, "measure_steps", lambda *_: steps)
    found = list(doctor.decode_findings())
    assert len(found) == doctor.N_DECODE_FINDINGS
    return {finding.name: finding for finding in found}


def test_every_type_is_measured_on_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FAMILIES", ("turbo3", "tbq3"))
    monkeypatch.setattr(doctor, "N_DECODE_FINDINGS", 8)
    found = decode_findings(monkeypatch, {})
    assert {name: finding.ok for name, finding in found.items()} == {
        "mini-q8_0 f16": None, "mini-q8_0 q8_0": None, "mini-q8_0 turbo3": True, "mini-q8_0 tbq3": True,
        "bias-q8_0 f16": None, "bias-q8_0 q8_0": None, "bias-q8_0 turbo3_64": True, "bias-q8_0 tbq3": None,
    }  # fmt: skip
    assert found["mini-q8_0 turbo3"].value == "KLD 0.0e+00, same top 100.00 % of 447"
    assert found["bias-q8_0 tbq3"].value.startswith(
        "skipped: tbq3 has blocks of 128 values, this model has heads of 64"
    )


@pytest.mark.parametrize(("steps", "cause"), [(GOOD, "rounding alone"), (WRONG, "the kernels of decoding and prefill")])
def test_type_that_decodes_differently_is_bad_and_says_why(
    monkeypatch: pytest.MonkeyPatch, steps: Agreement, cause: str
) -> None:
    found = decode_findings(monkeypatch, {"turbo4": DRIFTED}, steps)
    assert [name for name, finding in found.items() if finding.ok is False] == [
        "mini-q8_0 turbo4",
        "bias-q8_0 turbo4_64",
    ]
    value = found["mini-q8_0 turbo4"].value
    assert "KLD 3.0e-03, same top 95.00 % of 447, must be below 0.0001 and above 99.5 %" in value
    assert f"the KLD is {steps.mean_kld:.1e}: {cause}" in value


def test_types_of_llama_cpp_are_reported_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decode_findings(monkeypatch, {"f16": DRIFTED, "q8_0": DRIFTED})
    assert [name for name, finding in found.items() if finding.ok is False] == []
    assert "KLD 3.0e-03" in found["mini-q8_0 f16"].value


def test_type_that_a_model_should_take_and_does_not_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> CachePair:
        raise TurbokvError("no such cache")

    monkeypatch.setattr(engine.Model, "effective", refuse)
    found = decode_findings(monkeypatch, {})
    assert (found["mini-q8_0 turbo3"].ok, found["mini-q8_0 turbo3"].value) == (False, "no such cache")


DEEP = """
from turbokv import cli, decode_path
fake = {fake}
agreement = lambda model, pair, *_: decode_path.Agreement(fake.get(pair.k, 0.0), 1.0, 447)
decode_path.measure = decode_path.measure_steps = agreement
cli.main()
"""


@pytest.mark.parametrize(("fake", "code"), [({}, 0), ({"turbo3": 0.1}, 1)])
def test_deep_adds_its_findings_and_decides_the_exit_code(fake: dict[str, float], code: int) -> None:
    command = [sys.executable, "-c", DEEP.format(fake=fake), "doctor", "--deep"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == code
    assert ["turbo3" in line for line in bad_lines(run.stdout)] == 2 * code * [True]  # on either model
    assert "ok  llama-server:" in run.stdout
    assert re.search(r"^ok  mini-q8_0 turbo4: +KLD 0\.0e\+00", run.stdout, re.MULTILINE)
    assert f"[{doctor.N_DECODE_FINDINGS}/{doctor.N_DECODE_FINDINGS}] " in run.stderr


def test_deep_is_left_out_where_the_build_is_broken(copy: Path) -> None:
    (copy / "llama-bench").unlink()
    run = turbokv_doctor("--deep", package=copy.parent)
    assert run.returncode == 1
    assert "--deep was left out" in run.stderr
    assert "KLD" not in run.stdout


@pytest.mark.slow
def test_deep_finds_this_build_sound() -> None:
    run = turbokv_doctor("--deep")
    assert run.returncode == 0, run.stdout
    assert bad_lines(run.stdout) == []
    assert len(re.findall(r"^ok .* KLD ", run.stdout, re.MULTILINE)) >= len(FAMILIES)
