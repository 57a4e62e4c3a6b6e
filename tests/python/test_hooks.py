"""apply_hooks.py on small trees made here, and hooks.toml on the real llama.cpp where the build has fetched it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

REPO = Path(__file__).resolve().parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("apply_hooks", REPO / "ggml-ext" / "apply_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


apply_hooks = load_script()

GGML_H = "enum ggml_type {\n    GGML_TYPE_F32 = 0,\n    GGML_TYPE_COUNT,\n};\n"
OPS = "void get_rows(\n        int a,\n        int b) {\n    work();\n}\n\nvoid other() {\n    work_more();\n}\n"
TREE = {"ggml/include/ggml.h": GGML_H, "src/ops.cpp": OPS, "src/plain.cpp": "int plain;\n", "LICENSE": "upstream\n"}

ENUM = {"name": "enum", "file": "ggml/include/ggml.h", "anchor": "GGML_TYPE_COUNT,", "before": "OURS,"}
ROWS = {"name": "rows", "file": "src/ops.cpp", "anchor": "work_more();", "before": "first();", "after": "last();"}

Hook = dict[str, str]


@dataclass
class Overlay:
    """A source tree, a hooks.toml and a way to run the script on them."""

    root: Path
    run: Callable[..., int]

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def dest(self) -> Path:
        return self.root / "dest"

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())

    def hooks(self, *hooks: Hook) -> None:
        lines = []
        for hook in hooks:
            entry = {"why": f"why {hook['name']}", "test": "the build", **hook}
            lines += ["[[hook]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
        (self.root / "hooks.toml").write_text("\n".join(lines) + "\n")

    def hook(self, *hooks: Hook) -> int:
        self.hooks(*hooks)
        return self.run(self.source, self.dest)

    def read(self, name: str) -> str:
        return (self.dest / name).read_bytes().decode()


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Overlay:
    hooks_file = tmp_path / "hooks.toml"
    monkeypatch.setattr(apply_hooks, "HOOKS_FILE", hooks_file)
    monkeypatch.setattr(apply_hooks.load_hooks, "__defaults__", (hooks_file,))

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["apply_hooks.py", *map(str, arguments)])
        code: int = apply_hooks.main()
        return code

    made = Overlay(tmp_path, run)
    made.write(TREE)
    made.hooks(ENUM, ROWS)
    return made


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of every file."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- what is inserted


def test_lines_stand_around_the_anchor_and_end_with_the_marker(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    assert overlay.read("ggml/include/ggml.h") == (
        "enum ggml_type {\n    GGML_TYPE_F32 = 0,\nOURS, // [turbokv]\n    GGML_TYPE_COUNT,\n};\n"
    )
    assert overlay.read("src/ops.cpp") == OPS.replace(
        "    work_more();\n", "first(); // [turbokv]\n    work_more();\nlast(); // [turbokv]\n"
    )


def test_everything_else_is_copied_as_it_is(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    assert set(snapshot(overlay.dest)) == {*TREE, apply_hooks.STAMP}
    for name in ("src/plain.cpp", "LICENSE"):
        assert overlay.read(name) == TREE[name]


def test_multi_line_anchor_counts_from_its_first_to_its_last_line(overlay: Overlay) -> None:
    anchor = "\nvoid get_rows(\n        int a,\n        int b) {\n"
    assert overlay.hook({**ROWS, "anchor": anchor}) == 0
    assert overlay.read("src/ops.cpp") == "first(); // [turbokv]\n" + OPS.replace(
        "int b) {\n", "int b) {\nlast(); // [turbokv]\n"
    )


def test_several_hooks_share_a_file(overlay: Overlay) -> None:
    assert overlay.hook(ROWS, {**ROWS, "name": "second", "anchor": "    work();", "after": ""}) == 0
    assert overlay.read("src/ops.cpp") == OPS.replace("    work();", "first(); // [turbokv]\n    work();").replace(
        "    work_more();\n", "first(); // [turbokv]\n    work_more();\nlast(); // [turbokv]\n"
    )


def test_anchor_on_a_last_line_without_newline(overlay: Overlay) -> None:
    overlay.write({"src/ops.cpp": "int a;\nint last;"})
    assert overlay.hook({**ROWS, "anchor": "int last;", "after": ""}) == 0
    assert overlay.read("src/ops.cpp") == "int a;\nfirst(); // [turbokv]\nint last;"


def test_line_ends_of_a_hooked_file_stay(overlay: Overlay) -> None:
    overlay.write({"src/ops.cpp": OPS.replace("\n", "\r\n")})
    assert overlay.hook(ROWS) == 0
    upstream = [line for line in overlay.read("src/ops.cpp").splitlines(keepends=True) if "[turbokv]" not in line]
    assert "".join(upstream) == OPS.replace("\n", "\r\n")


def test_folders_that_no_build_needs_are_not_copied(overlay: Overlay) -> None:
    overlay.write({".git/HEAD": "ref\n", "docs/a.md": "a\n", "src/docs/b.md": "b\n"})
    assert overlay.hook(ENUM, ROWS) == 0
    assert set(snapshot(overlay.dest)) == {*TREE, "src/docs/b.md", apply_hooks.STAMP}


def test_executable_bit_is_copied(overlay: Overlay) -> None:
    (overlay.source / "src/plain.cpp").chmod(0o755)
    assert overlay.hook(ENUM, ROWS) == 0
    assert (overlay.dest / "src/plain.cpp").stat().st_mode & 0o777 == 0o755


def test_report_lists_the_hooks(overlay: Overlay) -> None:
    report = overlay.root / "hooks.json"
    assert overlay.run(overlay.source, overlay.dest, "--report", report) == 0
    assert json.loads(report.read_text()) == [
        {"name": "enum", "file": ENUM["file"], "lines": 1, "why": "why enum", "test": "the build"},
        {"name": "rows", "file": ROWS["file"], "lines": 2, "why": "why rows", "test": "the build"},
    ]


# --- keeping the copy


def test_second_run_writes_nothing(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    before = snapshot(overlay.dest)
    capsys.readouterr()
    assert overlay.hook(ENUM, ROWS) == 0
    assert "2 hooks, 3 lines in 2 files; 0 files written" in capsys.readouterr().out
    assert snapshot(overlay.dest) == before


def test_hook_taken_out_of_the_toml_disappears(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    assert overlay.hook(ENUM) == 0
    assert overlay.read("src/ops.cpp") == OPS
    assert "[turbokv]" in overlay.read("ggml/include/ggml.h")


def test_changed_source_file_is_the_only_one_written(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    before = snapshot(overlay.dest)
    overlay.write({"src/ops.cpp": OPS + "// newer\n"})
    capsys.readouterr()
    assert overlay.hook(ENUM, ROWS) == 0
    assert "1 files written" in capsys.readouterr().out
    after = snapshot(overlay.dest)
    assert [name for name in after if after[name] != before[name]] == ["src/ops.cpp"]
    assert overlay.read("src/ops.cpp").endswith("// newer\n")
    assert "first(); // [turbokv]\n" in overlay.read("src/ops.cpp")


def test_removed_source_file_is_removed(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    (overlay.source / "src/plain.cpp").unlink()
    assert overlay.hook(ENUM, ROWS) == 0
    assert set(snapshot(overlay.dest)) == {*TREE, apply_hooks.STAMP} - {"src/plain.cpp"}


def test_edited_copy_is_put_right(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    (overlay.dest / "src/plain.cpp").write_text("int edited;\n")
    (overlay.dest / "src/stray.cpp").write_text("int stray;\n")
    assert overlay.hook(ENUM, ROWS) == 0
    assert set(snapshot(overlay.dest)) == {*TREE, apply_hooks.STAMP}
    assert overlay.read("src/plain.cpp") == "int plain;\n"


def test_source_is_never_written_to(overlay: Overlay) -> None:
    before = snapshot(overlay.source)
    assert overlay.hook(ENUM, ROWS) == 0
    assert overlay.hook(ENUM) == 0
    assert snapshot(overlay.source) == before


@pytest.mark.parametrize("place", [".", "copy"])
def test_dest_inside_the_source_is_refused(overlay: Overlay, place: str) -> None:
    before = snapshot(overlay.source)
    assert overlay.run(overlay.source, overlay.source / place) != 0
    assert snapshot(overlay.source) == before


def test_without_dest_it_only_says_which_hooks_apply(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(overlay.root)
    assert overlay.run(overlay.source) == 0
    assert "2 hooks, 3 lines in 2 files" in capsys.readouterr().out
    assert snapshot(overlay.root) == before


# --- refusals

ABSENT = {**ROWS, "name": "absent", "anchor": "gone_upstream();"}
TWICE = {**ROWS, "name": "twice", "anchor": "work"}
NO_FILE = {**ROWS, "name": "no-file", "file": "src/moved.cpp"}


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (ABSENT, ["'absent'", "src/ops.cpp", "is not there", "anchor: gone_upstream();"]),
        (TWICE, ["'twice'", "src/ops.cpp", "occurs 2 times", "anchor: work"]),
        (NO_FILE, ["'no-file'", "src/moved.cpp", "does not exist"]),
    ],
    ids=["absent", "twice", "no-file"],
)
def test_hook_that_does_not_apply_is_named_and_nothing_is_written(
    overlay: Overlay, capsys: pytest.CaptureFixture[str], hook: Hook, says: list[str]
) -> None:
    assert overlay.hook(ENUM, hook) == 1
    message = capsys.readouterr().err
    what_to_do = ["Find", f"why {hook['name']}", "correct", str(overlay.root / "hooks.toml")]
    assert [text for text in says + what_to_do if text not in message] == []
    assert "'enum'" not in message
    assert not overlay.dest.exists()


def test_all_failing_hooks_are_reported_at_once(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    assert overlay.hook(ABSENT, ENUM, TWICE, NO_FILE) == 1
    assert re.findall(r"hook '([\w-]+)'", capsys.readouterr().err) == ["absent", "twice", "no-file"]


def test_failure_leaves_an_existing_copy_alone(overlay: Overlay) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    before = snapshot(overlay.dest)
    overlay.write({"src/plain.cpp": "int newer;\n"})
    assert overlay.hook(ENUM, ABSENT) == 1
    assert snapshot(overlay.dest) == before


def test_check_without_dest_fails_like_a_copy(overlay: Overlay) -> None:
    overlay.hooks(ABSENT)
    assert overlay.run(overlay.source) == 1


def test_folder_that_is_not_llama_cpp_is_refused(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    assert overlay.run(overlay.source / "src", overlay.dest) == 2
    assert "not a llama.cpp source tree" in capsys.readouterr().err
    assert not overlay.dest.exists()


def test_hooked_tree_is_refused_as_a_source(overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    assert overlay.hook(ENUM, ROWS) == 0
    again = overlay.root / "again"
    assert overlay.run(overlay.dest, again) == 1
    assert "already carries turbokv's lines" in capsys.readouterr().err
    assert not again.exists()


# --- the real hooks.toml


class RealHook(Protocol):
    """What these tests read of apply_hooks.Hook."""

    name: str
    file: str
    before: str
    after: str
    why: str
    test: str
    n_lines: int


HOOKS: list[RealHook] = apply_hooks.load_hooks()


def test_hooks_stay_few() -> None:
    cuda = [hook for hook in HOOKS if "/ggml-cuda/" in hook.file]
    assert len(HOOKS) - len(cuda) < 25
    assert len(cuda) < 10
    assert sum(hook.n_lines for hook in HOOKS) < 40


def test_hook_names_are_unique() -> None:
    names = [hook.name for hook in HOOKS]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("hook", HOOKS, ids=[hook.name for hook in HOOKS])
def test_hook_inserts_single_lines_and_says_why(hook: RealHook) -> None:
    assert hook.n_lines > 0
    assert "\n" not in hook.before + hook.after
    assert hook.why


@pytest.fixture(scope="module")
def upstream() -> Path:
    trees = sorted(REPO.glob("build/upstream/*/vendor/llama.cpp"))
    if not trees:
        pytest.skip("no llama.cpp under build/upstream: configure the build first")
    return trees[-1]


def test_every_hook_applies_to_the_pinned_llama_cpp(upstream: Path) -> None:
    content = apply_hooks.hooked_files(upstream, HOOKS)
    assert set(content) == {hook.file for hook in HOOKS}
    for name, text in content.items():
        inserted = [line for line in text.splitlines() if line.endswith(apply_hooks.MARKER)]
        assert len(inserted) == sum(hook.n_lines for hook in HOOKS if hook.file == name)
        kept = [line for line in text.splitlines() if not line.endswith(apply_hooks.MARKER)]
        assert kept == (upstream / name).read_text(encoding="utf-8").splitlines()


def missing_test(reference: str) -> str | None:
    """What a hook's `test` field names and does not exist; None when all is there."""
    kind, _, name = reference.partition(": ")
    if kind in ("the build", "the build with -DTURBOKV_CUDA=ON"):
        return None
    if kind == "scripts/gpu.sh":
        program = re.search(r"test-[\w-]+", name)
        found = program and program[0] in (REPO / "scripts" / "gpu.sh").read_text()
        return None if found else f"a test program in scripts/gpu.sh: {name}"
    if kind == "ctest":
        listing = re.sub(r"#.*", "", (REPO / "tests" / "CMakeLists.txt").read_text())
        return None if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", listing) else f"ctest {name}"
    if kind == "pytest":
        file, _, function = name.partition("::")
        path = REPO / "tests" / "python" / file
        if not path.is_file():
            return str(path)
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        return None if not function or function in functions else f"{function} in {path}"
    return f"a test of the kind '{kind}'"


@pytest.mark.parametrize("hook", HOOKS, ids=[hook.name for hook in HOOKS])
def test_the_test_that_guards_a_hook_exists(hook: RealHook) -> None:
    assert missing_test(hook.test) is None


@pytest.mark.parametrize(
    "reference",
    ["ctest: no-such-test", "pytest: no_such_file.py", "pytest: test_hooks.py::test_no_such", "by hand", ""],
)
def test_a_test_that_does_not_exist_is_noticed(reference: str) -> None:
    assert missing_test(reference) is not None
