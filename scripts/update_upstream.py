#!/usr/bin/env python3
"""Moves the pin to another llama.cpp, and says first what changed where our hooks and our code touch it.

    scripts/update_upstream.py [VERSION]               pin this llama-cpp-python (left out: the newest on PyPI)
    scripts/update_upstream.py --tree DIR              only compare some llama.cpp tree with the pin
    scripts/update_upstream.py --xllamacpp [VERSION]   only compare the tree in an xllamacpp release with the pin

The report: changes around each hook, hooks that no longer apply, upstream's type ids and cache types, and changed
lines that name something our code uses. The pin is written only when every hook applies, and all at once; then
everything is built and tested. Exit codes: 0 done, 1 not done, with the reason, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "ggml-ext"
sys.path[:0] = [str(EXTENSION), str(ROOT / "python")]

from apply_hooks import Hook, HookError, hooked_files, is_llama_cpp, load_hooks  # noqa: E402
from turbokv import data  # noqa: E402
from turbokv.errors import TurbokvError  # noqa: E402

PIN_FILE = EXTENSION / "upstream.cmake"
UPSTREAM = ROOT / "build" / "upstream"  # where upstream.cmake unpacks the pinned release
SECOND_BUILD = ROOT / "build-second"  # beside build/, so that ccache shares objects
PYPI = "https://pypi.org/pypi"
CONTEXT = 4  # lines shown around a hook


class UpdateError(TurbokvError):
    """What stops the update, and what to do about it."""


class FetchError(UpdateError):
    """A download that failed."""


# --- fetching


def download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content: bytes = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{url} could not be fetched: {error}. --tree DIR needs no network") from error
    return content


def find_release(name: str, version: str | None) -> tuple[str, str, str]:
    """Version, URL and SHA-256 of a source release on PyPI; the newest when no version is given."""
    page = f"{PYPI}/{name}/json"
    facts = json.loads(download(page))
    newest = str(facts["info"]["version"])
    for file in facts["releases"].get(version or newest, ()):
        if file["packagetype"] == "sdist":
            return version or newest, urllib.parse.urljoin(page, file["url"]), file["digests"]["sha256"]
    raise UpdateError(f"PyPI has no source release {version or newest} of {name}; the newest version is {newest}")


def fetch(name: str, version: str, sha256: str) -> Path:
    """The archive of a release, checked. It is kept where upstream.cmake keeps the pinned one."""
    archive = data.cache_dir() / f"{name.replace('-', '_')}-{version}.tar.gz"
    if archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == sha256:
        return archive
    _, url, _ = find_release(name, version)
    print(f"fetching {url}", flush=True)
    content = download(url)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UpdateError(f"{url} has SHA-256 {found}, expected {sha256}; nothing of it was kept")
    data.write_atomically(archive, content)
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks into an empty folder and returns the one folder in it."""
    shutil.unpack_archive(archive, folder)  # its SHA-256 is that of PyPI
    (unpacked,) = folder.iterdir()
    return unpacked


def llama_commit(sdist: Path) -> str:
    """The commit of vendor/llama.cpp, from the git folder that llama-cpp-python's releases happen to carry."""
    head = sdist / ".git" / "modules" / "vendor" / "llama.cpp" / "HEAD"
    commit = head.read_text().strip() if head.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UpdateError(
            "this release does not say which llama.cpp commit it carries: look up the submodule vendor/llama.cpp of "
            "its tag at https://github.com/abetlen/llama-cpp-python and pass --commit"
        )
    return commit


# --- the pin


def read_pin(text: str) -> dict[str, str]:
    """TURBOKV_PIN_NAME -> value."""
    return dict(re.findall(r'^set\((TURBOKV_PIN_\w+) +"([^"$]*)"\)', text, re.MULTILINE))


def with_pin(text: str, pin: dict[str, str]) -> str:
    for name, value in pin.items():
        text, count = re.subn(rf'^(set\({name} +")[^"]*', rf"\g<1>{value}", text, flags=re.MULTILINE)
        if count != 1:
            raise UpdateError(f"{PIN_FILE} sets {name} {count} times; it must be once")
    return text


def pinned_tree() -> Path:
    """The llama.cpp of today's pin."""
    version = read_pin(PIN_FILE.read_text())["TURBOKV_PIN_VERSION"]
    tree = UPSTREAM / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if not tree.is_dir():
        raise UpdateError(f"there is no {tree} to compare with: run `cmake -S . -B build -G Ninja` first")
    return tree


# --- what drifted


def read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def changed_lines(old: list[str], new: list[str]) -> list[str]:
    """The - and + lines of their diff."""
    return [line for line in list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:] if line[0] in "-+"]


def around(hook: Hook, lines: list[str]) -> list[str]:
    """The anchor and CONTEXT lines on both sides; empty unless the anchor occurs once."""
    text, anchor = "\n".join(lines), hook.anchor.strip("\n")
    if text.count(anchor) != 1:
        return []
    first = text[: text.index(anchor)].count("\n")
    return lines[max(0, first - CONTEXT) : first + anchor.count("\n") + 1 + CONTEXT]


def section(path: Path, begin: str) -> list[str]:
    """The lines from `begin` to the next `};`."""
    return "\n".join(read(path)).partition(begin)[2].partition("};")[0].splitlines()


def used_names(hooks: list[Hook]) -> tuple[set[str], set[str]]:
    """Identifiers in our sources and hooked lines; headers that our sources include or that hooked files go with."""
    sources = [path.read_text() for path in EXTENSION.glob("turbokv*") if path.suffix in (".c", ".cpp", ".h")]
    text = "\n".join([*sources, *(f"{hook.before}\n{hook.after}" for hook in hooks)])
    code = re.sub(r'//.*|"[^"\n]*"', "", text)
    names = {name for name in re.findall(r"[A-Za-z]\w+", code) if "_" in name and not name.endswith(("_t", "_API"))}
    headers = {*re.findall(r'#include "([\w-]+\.h)"', text), *(Path(hook.file).stem + ".h" for hook in hooks)}
    return {name for name in names if "turbo" not in name.lower()}, headers


def report_hooks(old: Path, new: Path, hooks: list[Hook]) -> bool:
    """Prints what changed around the hooks; returns whether all apply to the new tree."""
    print("\nHooked files, lines removed and added:")
    for file in sorted({hook.file for hook in hooks}):
        signs = [line[0] for line in changed_lines(read(old / file), read(new / file))]
        print(f"  {file}: -{signs.count('-')} +{signs.count('+')}")
    print("\nAround the hooks:")
    for hook in hooks:
        before, after = around(hook, read(old / hook.file)), around(hook, read(new / hook.file))
        if after and before != after:
            diff = list(difflib.unified_diff(before, after, lineterm=""))[3:]
            print("\n".join([f"  {hook.name} ({hook.file}): {hook.why}", *(f"    {line}" for line in diff)]))
    try:
        hooked_files(new, hooks)
    except HookError as error:
        print(error)
        return False
    print(f"  all {len(hooks)} hooks apply")
    return True


def report_types(old: Path, new: Path) -> bool:
    """Prints how upstream's types changed; returns whether our ids are still free."""
    print("\nType ids and cache types:")
    for file, begin in (("ggml/include/ggml.h", "enum ggml_type {"), ("common/arg.cpp", "kv_cache_types = {")):
        for line in changed_lines(section(old / file, begin), section(new / file, begin)):
            print(f"  {file}: {line}")
    enum = "\n".join(section(new / "ggml" / "include" / "ggml.h", "enum ggml_type {"))
    count = max(map(int, re.findall(r"= *(\d+)", enum)), default=0)
    first = int(re.findall(r"FIRST = (\d+)", (EXTENSION / "generated" / "turbokv-type-enum.inc").read_text())[0])
    free = count <= first
    print(f"  upstream's ids end below {count}, ours begin at {first}" + ("" if free else ": THEY COLLIDE"))
    return free


def report_names(old: Path, new: Path, hooks: list[Hook]) -> None:
    """Prints changed lines that name what our code uses: calls that may not compile, or mean something else now."""
    print("\nChanged lines that name what our code uses:")
    names, headers = used_names(hooks)
    paths = {path.relative_to(tree) for tree in (old, new) for path in tree.rglob("*.h") if path.name in headers}
    for path in sorted(paths | {Path(hook.file) for hook in hooks}):
        changed = changed_lines(read(old / path), read(new / path))
        lines = [line for line in changed if names & set(re.findall(r"\w+", line))]
        if lines:
            print("\n".join([f"  {path}:", *(f"    {line}" for line in lines)]))


# --- commands


def run(*command: str | Path) -> None:
    """Runs a command in the checkout, with the compiler cache shared between its build folders."""
    shared = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", "CC": "cc", "CXX": "c++"}
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    line = " ".join(map(str, command))
    print(f"\n$ {line}", flush=True)
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **shared, "PATH": path}, check=False).returncode:
        raise UpdateError(f"`{line}` failed; its output is above")


def examine(tree: Path) -> None:
    """Reports what drifted from the pin. Raises UpdateError when the overlay does not fit the tree."""
    if not is_llama_cpp(tree):
        raise UpdateError(f"{tree} is not a llama.cpp source tree (no ggml/include/ggml.h)")
    pinned, hooks = pinned_tree(), load_hooks()
    apply, free = report_hooks(pinned, tree, hooks), report_types(pinned, tree)
    report_names(pinned, tree, hooks)
    if not apply or not free:
        raise UpdateError("the overlay does not fit this tree (the reasons are above); nothing was written")


def second_tree(version: str, sha256: str) -> Path:
    """The llama.cpp of an xllamacpp release, unpacked into build-second/."""
    unpacked = SECOND_BUILD / "upstream" / f"xllamacpp-{version}"
    if not unpacked.is_dir():
        archive = fetch("xllamacpp", version, sha256)
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
            unpack(archive, Path(folder)).rename(unpacked)
    return unpacked / "thirdparty" / "llama.cpp"


def build_second(tree: Path, *targets: str) -> None:
    """Builds the overlay on a tree other than the pinned one, in build-second/."""
    options = [f"-DPython3_EXECUTABLE={sys.executable}", f"-DTURBOKV_LLAMA_SOURCE={tree}"]
    run("cmake", "-S", ROOT, "-B", SECOND_BUILD, "-G", "Ninja", *options)
    run("cmake", "--build", SECOND_BUILD, "--target", *targets)


def update(version: str | None, commit: str | None, dry_run: bool) -> bool:
    """Reports, then writes the pin. Returns whether it was written."""
    version, _, sha256 = find_release("llama-cpp-python", version)
    with tempfile.TemporaryDirectory() as folder:
        sdist = unpack(fetch("llama-cpp-python", version, sha256), Path(folder))
        tree = sdist / "vendor" / "llama.cpp"
        examine(tree)
        pin = {
            "TURBOKV_PIN_VERSION": version,
            "TURBOKV_PIN_COMMIT": commit or llama_commit(sdist),
            "TURBOKV_PIN_SHA256": sha256,
            "TURBOKV_PIN_LLAMA_H": hashlib.sha256((tree / "include" / "llama.h").read_bytes()).hexdigest(),
        }
    text = PIN_FILE.read_text()
    old, changed = read_pin(text), with_pin(text, pin)
    print("\nThe pin:", *(f"  {name}: {old[name]} -> {value}" for name, value in pin.items()), sep="\n")
    if dry_run or changed == text:
        print("unchanged" if changed == text else "not written: --dry-run")
        return False
    data.write_atomically(PIN_FILE, changed.encode())
    print(f"written to {PIN_FILE}. Other places that name {old['TURBOKV_PIN_VERSION']}:", flush=True)
    if shutil.which("git"):
        subprocess.run(["git", "grep", "-nF", old["TURBOKV_PIN_VERSION"]], cwd=ROOT, check=False)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("version", nargs="?", help="of llama-cpp-python")
    what.add_argument("--tree", type=Path, metavar="DIR", help="only examine this llama.cpp tree")
    what.add_argument("--xllamacpp", nargs="?", const="", metavar="VERSION", help="only examine this release's tree")
    parser.add_argument("--commit", help="of llama.cpp in the release, where the release does not say it")
    parser.add_argument("--dry-run", action="store_true", help="do not write the pin")
    parser.add_argument("--no-gate", action="store_true", help="do not build and test after writing the pin")
    parser.add_argument("--build", action="store_true", help="with --xllamacpp: also build on it, in build-second/")
    args = parser.parse_args()
    if args.build and args.xllamacpp is None:
        parser.error("--build goes with --xllamacpp")
    written = False
    try:
        if args.tree:
            examine(args.tree)
        elif args.xllamacpp is not None:
            version, _, sha256 = find_release("xllamacpp", args.xllamacpp or None)
            tree = second_tree(version, sha256)
            examine(tree)
            if args.build:
                build_second(tree, "turbokv-tools")
        else:
            written = update(args.version, args.commit, args.dry_run)
            if written and not args.no_gate:
                run("scripts/test.sh")
                run("pytest", "-m", "upstream")  # what was changed for the new pin still fits the second upstream
    except TurbokvError as error:
        print(f"update_upstream.py: {error}", file=sys.stderr)
        if written:
            print("The new pin stays written; `git checkout ggml-ext/upstream.cmake` takes it back.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
