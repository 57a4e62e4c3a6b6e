"""No hook is idle: without its lines, what hooks.toml names as its test fails.

Losses that the compiler sees are shown by compiling the touched file in a scratch tree, with the commands of build/.
The others are slow: build-hooks/ is a whole build of its own, in which one hook after the other is taken out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ggml-ext"))

from apply_hooks import MARKER, Hook, insert, load_hooks  # noqa: E402

HOOKS = load_hooks()
SEEN_ON_GPU = [hook for hook in HOOKS if "scripts/gpu.sh" in hook.test or "TURBOKV_CUDA" in hook.test]  # not here
SEEN_BY_COMPILER = [hook for hook in HOOKS if hook not in SEEN_ON_GPU and hook.test.startswith("the build")]
SEEN_BY_TEST = [hook for hook in HOOKS if hook not in SEEN_ON_GPU and hook not in SEEN_BY_COMPILER]


def hook_id(hook: Hook) -> str:
    return hook.name


def without(lost: Hook, hooked: str) -> str:
    """The text of a hooked file as it is without one of its hooks."""
    text = "".join(line for line in hooked.splitlines(keepends=True) if not line.rstrip().endswith(MARKER))
    for hook in HOOKS:
        if hook.file == lost.file and hook != lost:
            text = insert(hook, text)
    return text


def test_only_the_lines_of_the_lost_hook_go() -> None:
    for lost in HOOKS:
        others = [hook for hook in HOOKS if hook.file == lost.file and hook != lost]
        upstream = "".join(hook.anchor.strip("\n") + "\n" for hook in (lost, *others))
        hooked = upstream
        for hook in (lost, *others):
            hooked = insert(hook, hooked)
        left = [line for line in without(lost, hooked).splitlines() if line.endswith(MARKER)]
        kept = sorted(f"{line} {MARKER}" for hook in others for line in (hook.before, hook.after) if line)
        assert sorted(left) == kept


# --- losses that the compiler sees


class ScratchTree:
    """A copy of build/llama.cpp, of symbolic links, and a compiler that only checks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.build = REPO / "build"
        shutil.copytree(self.build / "llama.cpp", root, copy_function=os.symlink)
        entries = json.loads((self.build / "compile_commands.json").read_text())
        self.commands: dict[str, str] = {entry["file"]: entry["command"] for entry in entries}

    def units(self, file: str) -> list[str]:
        """What to compile for a file of llama.cpp: itself, or for a header our own sources, which need its lines."""
        unit = str(self.build / "llama.cpp" / file)
        own = [name for name in self.commands if name.startswith(str(REPO / "ggml-ext"))]
        return [unit] if unit in self.commands else own

    def errors(self, unit: str) -> str:
        """What the compiler says of one unit in this tree; empty when it compiles."""
        command = re.sub(rf"{re.escape(str(self.build))}/llama\.cpp(?=/)", str(self.root), self.commands[unit])
        compiler = subprocess.run(
            [*shlex.split(command), "-fsyntax-only"],
            cwd=self.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return compiler.stderr if compiler.returncode else ""


@pytest.mark.parametrize("hook", SEEN_BY_COMPILER, ids=hook_id)
def test_lost_hook_does_not_compile(hook: Hook, tmp_path: Path) -> None:
    if not (REPO / "build" / "compile_commands.json").is_file():
        pytest.skip("build/ is not configured")
    tree = ScratchTree(tmp_path / "llama.cpp")
    units = tree.units(hook.file)
    assert [tree.errors(unit) for unit in units] == [""] * len(units)  # with the hook in place

    file = tree.root / hook.file
    text = without(hook, file.read_bytes().decode())
    file.unlink()  # the link, not the file behind it
    file.write_bytes(text.encode())
    errors = "".join(tree.errors(unit) for unit in units)
    assert re.search(r"error: .*turbo", errors, re.IGNORECASE), errors or f"compiles without {hook.name}"


# --- losses that a test sees

BUILD = REPO / "build-hooks"  # beside build/, and with its compiler names, so that ccache shares the objects
BUILD_ENV = {**os.environ, "CC": "cc", "CXX": "c++", "CCACHE_BASEDIR": str(REPO), "CCACHE_NOHASHDIR": "1"}


def run(*command: str | Path, env: dict[str, str] = BUILD_ENV) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=3600)
    finally:  # without its hook a server starts that its test expects to refuse, and that nobody stops
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose build/ is build-hooks/: our Python finds the tools there, and its tests test them."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake or ninja is not on PATH")
    configured = run("cmake", "-S", REPO, "-B", BUILD, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}")
    assert configured.returncode == 0, configured.stdout[-4000:]

    root = tmp_path_factory.mktemp("checkout")
    for folder in ("python", "tests"):
        shutil.copytree(REPO / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "data", "_native"))
    shutil.copy(REPO / "pyproject.toml", root)
    (root / "python" / "turbokv" / "data").symlink_to(REPO / "python" / "turbokv" / "data")
    (root / "build").symlink_to(BUILD)
    # Python runs this at its start. PathFinder first: PYTHONPATH, not the import hook of an editable install.
    (root / "python" / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import PathFinder\n\nsys.meta_path.insert(0, PathFinder)\n"
    )
    return root


def outcome(reference: str, checkout: Path) -> str:
    """'passed' or 'failed': what the test of a hook's `test` field does now. Fails when it does not run at all."""
    kind, _, name = reference.partition(": ")
    if kind == "ctest":
        ran = run("ctest", "--test-dir", BUILD, "-R", f"^{name}$", "--no-tests=error", "--output-on-failure")
        failed = re.search(rf"\d+ - {re.escape(name)} \((?!Not Run)", ran.stdout)  # in its list of failed tests
    else:
        test = checkout / "tests" / "python" / name
        environment = {**os.environ, "PYTHONPATH": str(checkout / "python")}
        ran = run(sys.executable, "-m", "pytest", "--rootdir", checkout, "-m", "", "-x", test, env=environment)
        failed = re.search(rf"^FAILED \S*{re.escape(name)}", ran.stdout, re.MULTILINE)
    if failed:
        return "failed"
    if ran.returncode == 0 and "passed" in ran.stdout:  # not skipped
        return "passed"
    pytest.fail(f"{reference} could not be run:\n{ran.stdout[-4000:]}")


@pytest.mark.slow
@pytest.mark.parametrize("reference", sorted({hook.test for hook in SEEN_BY_TEST}))
def test_with_all_hooks_the_test_passes(reference: str, checkout: Path) -> None:
    assert run("cmake", "--build", BUILD).returncode == 0
    assert outcome(reference, checkout) == "passed"


@pytest.mark.slow
def test_the_checkout_uses_the_build_that_is_damaged(checkout: Path) -> None:
    code = "from turbokv import native; print(native.native_dir().resolve())"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "python")}
    assert run(sys.executable, "-c", code, env=environment).stdout.strip() == str(BUILD / "bin")


@pytest.mark.slow
@pytest.mark.parametrize("hook", SEEN_BY_TEST, ids=hook_id)
def test_lost_hook_fails_its_test(hook: Hook, checkout: Path) -> None:
    file = BUILD / "llama.cpp" / hook.file
    hooked = file.read_bytes()
    lost = without(hook, hooked.decode()).encode()
    try:
        file.write_bytes(lost)
        built = run("cmake", "--build", BUILD)
        assert built.returncode == 0, f"the test of {hook.name} is 'the build', which stops:\n{built.stdout[-4000:]}"
        assert file.read_bytes() == lost, "the build was configured again, which put the hook back; run this again"
        assert outcome(hook.test, checkout) == "failed", f"{hook.test} passes without the hook {hook.name}"
    finally:
        file.write_bytes(hooked)
