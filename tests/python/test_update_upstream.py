"""scripts/update_upstream.py on small releases made here: what it reports, and when it writes the pin. No network."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))

import update_upstream  # noqa: E402
from apply_hooks import Hook  # noqa: E402
from turbokv import data  # noqa: E402
from update_upstream import UpdateError, read_pin, with_pin  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAD = ".git/modules/vendor/llama.cpp/HEAD"
TREE = {
    "ggml/include/ggml.h": "enum ggml_type {\n    GGML_TYPE_F32 = 0,\n    GGML_TYPE_COUNT = 1,\n};\n",
    "common/arg.cpp": "const types kv_cache_types = {\n    GGML_TYPE_F32,\n};\n",
    "include/llama.h": "int llama_api(void);\n",
    "src/llama-kv-cache.h": "bool attn_rot = false;\nint other_thing;\n",
    "src/llama-kv-cache.cpp": "void start() {\n    prepare();\n    rotate();\n}\n" + "int filler;\n" * 20,
}
HOOKS = [
    Hook("enum", "ggml/include/ggml.h", "GGML_TYPE_COUNT", "why enum", "the build", before="OURS,"),
    Hook("check", "src/llama-kv-cache.cpp", "rotate();", "why check", "the build", after="turbokv_check(attn_rot);"),
]


def sdist(name: str, files: dict[str, str]) -> bytes:
    """A .tar.gz with one folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, text in files.items():
            info = tarfile.TarInfo(f"{name}/{path}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@dataclass
class Checkout:
    """A checkout with a pin and hooks, and the PyPI that the script sees."""

    root: Path
    pages: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def download(self, url: str) -> bytes:
        self.fetched.append(url)
        if url not in self.pages:
            raise UpdateError(f"{url} could not be fetched")
        return self.pages[url]

    def publish(self, project: str, version: str, tree: dict[str, str], **other: str) -> None:
        """Puts a release on PyPI, as its newest. The tree stands where that project has it."""
        vendor = {"llama-cpp-python": "vendor/llama.cpp", "xllamacpp": "thirdparty/llama.cpp"}[project]
        files = {f"{vendor}/{name}": text for name, text in tree.items()} | other
        archive = sdist(f"{project}-{version}", files)
        page = f"https://pypi.org/pypi/{project}/json"
        facts = json.loads(self.pages.get(page, b'{"info": {}, "releases": {}}'))
        facts["info"]["version"] = version
        sha256 = hashlib.sha256(archive).hexdigest()
        entry = {"packagetype": "sdist", "url": f"../../files/{project}-{version}", "digests": {"sha256": sha256}}
        facts["releases"][version] = [{**entry, "packagetype": "bdist_wheel", "url": "no"}, entry]
        self.pages[page] = json.dumps(facts).encode()
        self.pages[f"https://pypi.org/files/{project}-{version}"] = archive

    def update(self, *arguments: str | Path) -> int:
        sys.argv = ["update_upstream.py", *map(str, arguments)]
        return update_upstream.main()

    @property
    def pin_file(self) -> Path:
        return self.root / "ggml-ext" / "upstream.cmake"

    @property
    def cached(self) -> list[str]:
        return sorted(path.name for path in (self.root / "cache" / "turbokv").glob("*"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    made = Checkout(tmp_path)
    pin = (REPO / "ggml-ext" / "upstream.cmake").read_text()
    pinned = f"build/upstream/llama_cpp_python-{read_pin(pin)['TURBOKV_PIN_VERSION']}/vendor/llama.cpp"
    extension = {
        "upstream.cmake": pin,
        "turbokv-llama.cpp": '#include "llama.h"\nint x = llama_api();  // not other_thing\n',
        "generated/turbokv-type-enum.inc": "GGML_TYPE_TURBOKV_FIRST = 224, // ours\n",
    }
    write(tmp_path / "ggml-ext", extension)
    write(tmp_path / pinned, TREE)
    monkeypatch.setattr(update_upstream, "ROOT", tmp_path)
    monkeypatch.setattr(update_upstream, "EXTENSION", tmp_path / "ggml-ext")
    monkeypatch.setattr(update_upstream, "PIN_FILE", made.pin_file)
    monkeypatch.setattr(update_upstream, "UPSTREAM", tmp_path / "build" / "upstream")
    monkeypatch.setattr(update_upstream, "SECOND_BUILD", tmp_path / "build-second")
    monkeypatch.setattr(update_upstream, "load_hooks", lambda: HOOKS)
    monkeypatch.setattr(update_upstream, "download", made.download)
    monkeypatch.setattr(update_upstream, "run", lambda *command: made.ran.append(" ".join(map(str, command))))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


# --- the pin


def test_the_real_pin_is_read() -> None:
    pin = read_pin((REPO / "ggml-ext" / "upstream.cmake").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin["TURBOKV_PIN_VERSION"])
    assert re.fullmatch(r"[0-9a-f]{40}", pin["TURBOKV_PIN_COMMIT"])
    assert re.fullmatch(r"[0-9a-f]{64}", pin["TURBOKV_PIN_SHA256"])
    assert re.fullmatch(r"[0-9a-f]{64}", pin["TURBOKV_PIN_LLAMA_H"])
    assert len(pin) == 4


def test_a_pin_that_is_not_set_once_is_refused() -> None:
    line = 'set(TURBOKV_PIN_COMMIT "a")\n'
    assert with_pin(line, {"TURBOKV_PIN_COMMIT": "b"}) == 'set(TURBOKV_PIN_COMMIT "b")\n'
    for text in ("", line * 2):
        with pytest.raises(UpdateError, match="TURBOKV_PIN_COMMIT"):
            with_pin(text, {"TURBOKV_PIN_COMMIT": "b"})


def test_the_newest_release_is_pinned_and_nothing_else_changes(checkout: Checkout) -> None:
    checkout.publish("llama-cpp-python", "9.9.8", {})
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: f"{COMMIT}\n"})
    before = checkout.pin_file.read_text()
    assert checkout.update() == 0
    pin = {
        "TURBOKV_PIN_VERSION": "9.9.9",
        "TURBOKV_PIN_COMMIT": COMMIT,
        "TURBOKV_PIN_SHA256": hashlib.sha256(
            checkout.pages["https://pypi.org/files/llama-cpp-python-9.9.9"]
        ).hexdigest(),
        "TURBOKV_PIN_LLAMA_H": hashlib.sha256(TREE["include/llama.h"].encode()).hexdigest(),
    }
    after = checkout.pin_file.read_text()
    assert read_pin(after) == pin
    assert with_pin(after, read_pin(before)) == before
    assert checkout.cached == ["llama_cpp_python-9.9.9.tar.gz"]  # where upstream.cmake looks for it
    assert checkout.ran == ["scripts/test.sh", "pytest -m upstream"]


def test_a_release_is_pinned_by_its_version_without_a_gate(checkout: Checkout) -> None:
    checkout.publish("llama-cpp-python", "9.9.8", TREE, **{HEAD: COMMIT})
    checkout.publish("llama-cpp-python", "9.9.9", {})
    assert checkout.update("9.9.8", "--no-gate") == 0
    assert read_pin(checkout.pin_file.read_text())["TURBOKV_PIN_VERSION"] == "9.9.8"
    assert checkout.ran == []


def test_commit_that_the_release_does_not_say_is_asked_for(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: "ref: refs/heads/master\n"})
    before = checkout.pin_file.read_text()
    assert checkout.update() == 1
    assert "--commit" in capsys.readouterr().err
    assert checkout.pin_file.read_text() == before
    assert checkout.update("--commit", COMMIT) == 0
    assert read_pin(checkout.pin_file.read_text())["TURBOKV_PIN_COMMIT"] == COMMIT


def test_dry_run_writes_no_pin_and_builds_nothing(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: COMMIT})
    before = checkout.pin_file.read_text()
    assert checkout.update("--dry-run") == 0
    assert f"TURBOKV_PIN_VERSION: {read_pin(before)['TURBOKV_PIN_VERSION']} -> 9.9.9" in capsys.readouterr().out
    assert checkout.pin_file.read_text() == before
    assert checkout.ran == []


def test_failed_gate_says_how_to_take_the_pin_back(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*command: str) -> None:
        raise UpdateError("`scripts/test.sh` failed")

    monkeypatch.setattr(update_upstream, "run", fail)
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: COMMIT})
    assert checkout.update() == 1
    message = capsys.readouterr().err
    assert "`scripts/test.sh` failed" in message
    assert "git checkout ggml-ext/upstream.cmake" in message


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"pin": "old"}) / "pin"

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, b"new")
    assert path.read_text() == "old"


# --- fetching


def test_damaged_download_is_refused_and_not_kept(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: COMMIT})
    checkout.pages["https://pypi.org/files/llama-cpp-python-9.9.9"] = b"half"
    assert checkout.update() == 1
    assert hashlib.sha256(b"half").hexdigest() in capsys.readouterr().err
    assert checkout.cached == []


def test_fetched_release_is_not_fetched_again_unless_damaged(checkout: Checkout) -> None:
    checkout.publish("llama-cpp-python", "9.9.9", TREE, **{HEAD: COMMIT})
    url = "https://pypi.org/files/llama-cpp-python-9.9.9"
    assert checkout.update("--dry-run") == checkout.update("--dry-run") == 0
    assert checkout.fetched.count(url) == 1
    (checkout.root / "cache/turbokv/llama_cpp_python-9.9.9.tar.gz").write_bytes(b"half")
    assert checkout.update("--dry-run") == 0
    assert checkout.fetched.count(url) == 2


def test_unknown_version_is_named_with_the_newest(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.publish("llama-cpp-python", "9.9.9", TREE)
    assert checkout.update("9.9.7") == 1
    message = capsys.readouterr().err
    assert "9.9.7" in message and "9.9.9" in message


def test_without_network_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_upstream, "PYPI", "http://127.0.0.1:9")  # nobody listens at the discard port
    monkeypatch.setattr(sys, "argv", ["update_upstream.py", "--dry-run"])
    assert update_upstream.main() == 1
    message = capsys.readouterr().err
    assert "could not be fetched" in message and "--tree" in message


# --- the report


def report(checkout: Checkout, capsys: pytest.CaptureFixture[str], code: int = 0, **changes: str) -> str:
    """What is said of a tree with some files changed; keys are file names, with _ for every . and /."""
    names = {re.sub(r"\W", "_", name): name for name in TREE}
    tree = write(checkout.root / "tree", TREE | {names[key]: text for key, text in changes.items()})
    before = checkout.pin_file.read_text()
    assert checkout.update("--tree", tree) == code
    assert checkout.pin_file.read_text() == before
    assert checkout.fetched == checkout.ran == []
    said = capsys.readouterr()
    return said.out + said.err


def test_the_same_tree_has_not_drifted(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    said = report(checkout, capsys)
    assert "src/llama-kv-cache.cpp: -0 +0" in said
    assert "all 2 hooks apply" in said
    assert not re.search(r"^ +[-+]", said, re.MULTILINE)


def test_changes_near_a_hook_are_shown_with_its_reason(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    changed = TREE["src/llama-kv-cache.cpp"].replace("prepare();", "prepare_more();\n    and_more();") + "int far;\n"
    said = report(checkout, capsys, src_llama_kv_cache_cpp=changed)
    assert "src/llama-kv-cache.cpp: -1 +3" in said
    assert "check (src/llama-kv-cache.cpp): why check" in said
    assert "    -    prepare();\n    +    prepare_more();\n    +    and_more();\n         rotate();\n" in said
    assert "int far;" not in said
    assert "why enum" not in said


def test_lost_anchor_is_named_and_nothing_is_pinned(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    lost = TREE | {"src/llama-kv-cache.cpp": "void start() {}\n"}
    assert "hook 'check' does not apply" in report(checkout, capsys, 1, src_llama_kv_cache_cpp="void start() {}\n")
    checkout.publish("llama-cpp-python", "9.9.9", lost, **{HEAD: COMMIT})
    before = checkout.pin_file.read_text()
    assert checkout.update() == 1
    assert "nothing was written" in capsys.readouterr().err
    assert checkout.pin_file.read_text() == before
    assert checkout.ran == []


@pytest.mark.parametrize(("count", "code"), [(224, 0), (225, 1)])
def test_upstream_types_that_reach_our_ids_are_refused(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], count: int, code: int
) -> None:
    enum = f"enum ggml_type {{\n    GGML_TYPE_F32 = 0,\n    GGML_TYPE_NEW = 1,\n    GGML_TYPE_COUNT = {count},\n}};\n"
    said = report(checkout, capsys, code, ggml_include_ggml_h=enum)
    assert "ggml/include/ggml.h: +    GGML_TYPE_NEW = 1," in said
    assert f"end below {count}, ours begin at 224" in said
    assert ("COLLIDE" in said) == (code == 1)


def test_new_cache_types_are_shown(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    arg = TREE["common/arg.cpp"].replace("F32,\n", "F32,\n    GGML_TYPE_NEW,\n")
    assert "common/arg.cpp: +    GGML_TYPE_NEW," in report(checkout, capsys, common_arg_cpp=arg)


def test_changed_lines_that_our_code_names_are_shown_and_no_others(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    said = report(
        checkout,
        capsys,
        include_llama_h="int llama_api(int);\nint llama_new(void);\n",
        src_llama_kv_cache_h="unsigned n_rot = 0;\nlong other_thing;\n",
    )
    shown = said.split("Changed lines")[1]
    assert "  include/llama.h:\n    -int llama_api(void);\n    +int llama_api(int);\n" in shown  # a call of ours
    assert "  src/llama-kv-cache.h:\n    -bool attn_rot = false;\n" in shown  # named in a hooked line
    assert "llama_new" not in shown
    assert "other_thing" not in shown  # stands in a comment of ours only


def test_folder_that_is_not_llama_cpp_is_refused(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkout.update("--tree", checkout.root) == 1
    assert "not a llama.cpp source tree" in capsys.readouterr().err


def test_without_the_pinned_tree_it_says_how_to_get_it(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_upstream, "UPSTREAM", checkout.root / "none")
    assert checkout.update("--tree", write(checkout.root / "tree", TREE)) == 1
    assert "cmake -S . -B build" in capsys.readouterr().err


# --- the second upstream


def test_xllamacpp_is_compared_and_left_alone(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.publish("xllamacpp", "2026.1", TREE)
    before = checkout.pin_file.read_text()
    assert checkout.update("--xllamacpp") == checkout.update("--xllamacpp", "2026.1") == 0
    assert capsys.readouterr().out.count("all 2 hooks apply") == 2
    assert checkout.fetched.count("https://pypi.org/files/xllamacpp-2026.1") == 1
    assert checkout.pin_file.read_text() == before
    assert checkout.ran == []


def test_xllamacpp_is_built_in_a_folder_of_its_own(checkout: Checkout) -> None:
    checkout.publish("xllamacpp", "2026.1", TREE)
    assert checkout.update("--xllamacpp", "--build") == 0
    second = checkout.root / "build-second"
    tree = second / "upstream" / "xllamacpp-2026.1" / "thirdparty" / "llama.cpp"
    assert (tree / "include" / "llama.h").read_text() == TREE["include/llama.h"]
    configure, build = checkout.ran
    assert f"-B {second} " in configure and f"-DTURBOKV_LLAMA_SOURCE={tree}" in configure
    assert build == f"cmake --build {second} --target turbokv-tools"


def test_tree_that_does_not_fit_is_not_built(checkout: Checkout) -> None:
    checkout.publish("xllamacpp", "2026.1", TREE | {"src/llama-kv-cache.cpp": ""})
    assert checkout.update("--xllamacpp", "--build") == 1
    assert checkout.ran == []


@pytest.mark.parametrize("arguments", [["--build"], ["1.0", "--tree", "x"], ["--tree", "x", "--xllamacpp"]])
def test_arguments_that_exclude_each_other(checkout: Checkout, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        checkout.update(*arguments)
