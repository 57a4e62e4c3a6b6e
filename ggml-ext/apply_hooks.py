#!/usr/bin/env python3
"""Makes and keeps a hooked copy of a llama.cpp tree.

    apply_hooks.py SOURCE DEST [--report FILE]   copy SOURCE to DEST with the hooks of hooks.toml inserted
    apply_hooks.py SOURCE                        only say which hooks apply

SOURCE is never written to. DEST ends up equal to SOURCE plus the inserted lines; files that are already right
are left alone, so that running it again changes nothing and rebuilds nothing. Nothing is written unless every
hook applies. Exit codes: 0 all hooks apply, 1 a hook does not, 2 SOURCE is not a llama.cpp tree or a file
could not be written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

MARKER = "// [turbokv]"
STAMP = ".turbokv-copy"  # stands in every hooked copy: what lacks it is not ours to change
HOOKS_FILE = Path(__file__).resolve().parent / "hooks.toml"

# What a build needs of a llama.cpp tree. A checkout may hold anything else: models, build folders, environments.
COPIED = {
    "CMakeLists.txt", "LICENSE", "app", "cmake", "common", "examples", "ggml", "gguf-py", "grammars", "include",
    "licenses", "scripts", "src", "tests", "tools", "vendor",
}  # fmt: skip


@dataclass(frozen=True)
class Hook:
    name: str
    file: str
    anchor: str
    why: str
    test: str
    before: str = ""
    after: str = ""

    @property
    def n_lines(self) -> int:
        return bool(self.before) + bool(self.after)


class HookError(Exception):
    """A hook that does not apply; the message says which, where and what to do."""


def load_hooks(path: Path = HOOKS_FILE) -> list[Hook]:
    with path.open("rb") as file:
        return [Hook(**entry) for entry in tomllib.load(file)["hook"]]


def is_llama_cpp(source: Path) -> bool:
    return (source / "ggml" / "include" / "ggml.h").is_file()


def insert(hook: Hook, text: str) -> str:
    """Returns text with the hook's lines inserted. Raises HookError unless the anchor occurs exactly once."""
    anchor = hook.anchor.strip("\n")
    count = text.count(anchor)
    if count != 1:
        what = "is not there" if count == 0 else f"occurs {count} times"
        raise HookError(
            f"hook '{hook.name}' does not apply to {hook.file}: its anchor {what}.\n"
            f"  anchor: {anchor}\n"
            f"  Upstream changed here. Find where this now belongs ({hook.why}),\n"
            f"  and correct the anchor of '{hook.name}' in {HOOKS_FILE}."
        )
    start = text.rfind("\n", 0, text.index(anchor)) + 1
    newline = text.find("\n", text.index(anchor) + len(anchor))
    end = newline + 1 if newline >= 0 else len(text)
    before = f"{hook.before} {MARKER}\n" if hook.before else ""
    after = f"{hook.after} {MARKER}\n" if hook.after else ""
    if after and newline < 0:
        after = "\n" + after
    return text[:start] + before + text[start:end] + after + text[end:]


def hooked_files(source: Path, hooks: list[Hook]) -> dict[str, str]:
    """Content of every touched file, with its hooks. Raises one HookError that names all hooks that fail."""
    content: dict[str, str] = {}
    problems = []
    for hook in hooks:
        try:
            if hook.file not in content:
                content[hook.file] = (source / hook.file).read_bytes().decode()
                if MARKER in content[hook.file]:
                    raise HookError(
                        f"{source / hook.file} already carries turbokv's lines; point at an unmodified tree."
                    )
            content[hook.file] = insert(hook, content[hook.file])
        except FileNotFoundError:
            problems.append(
                f"hook '{hook.name}': {hook.file} does not exist in {source}.\n"
                f"  anchor: {hook.anchor.strip()}\n"
                f"  Upstream moved or removed it. Find its new place ({hook.why}) and correct {HOOKS_FILE}."
            )
        except UnicodeDecodeError:
            problems.append(f"hook '{hook.name}': {source / hook.file} is not UTF-8 text; is it a source file?")
        except HookError as error:
            problems.append(str(error))
    if problems:
        raise HookError("\n".join(problems))
    return content


def synchronize(source: Path, dest: Path, hooked: dict[str, str]) -> int:
    """Makes dest equal to source plus the hooks; returns how many files had to be written or removed.

    Raises HookError for a dest that overlaps source, or holds files that an earlier run did not put there.
    """
    source, dest = source.resolve(), dest.resolve()
    if dest.is_relative_to(source) or source.is_relative_to(dest):
        raise HookError(f"{dest} overlaps the source tree {source}; choose a folder outside of it")
    stamp = dest / STAMP
    if dest.exists() and not stamp.is_file() and (not dest.is_dir() or any(dest.iterdir())):
        raise HookError(f"{dest} is not a copy made by this script; choose an empty folder, or delete it yourself")
    dest.mkdir(parents=True, exist_ok=True)
    if not stamp.is_file():
        stamp.touch()  # first: an interrupted copy is recognized and completed by the next run

    changed = 0
    wanted = {Path(STAMP)}
    tops = sorted(path for path in source.iterdir() if path.name in COPIED)
    for path in (file for top in tops for file in ([top] if top.is_file() else sorted(top.rglob("*")))):
        relative = path.relative_to(source)
        if not path.is_file():
            continue
        wanted.add(relative)
        target = dest / relative
        content = hooked[relative.as_posix()].encode() if relative.as_posix() in hooked else path.read_bytes()
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        shutil.copymode(path, target)
        changed += 1
    for path in dest.rglob("*"):
        if path.is_file() and path.relative_to(dest) not in wanted:
            path.unlink()
            changed += 1
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an unmodified llama.cpp tree")
    parser.add_argument("dest", type=Path, nargs="?", help="the hooked copy; left out: only check")
    parser.add_argument("--report", type=Path, help="write the applied hooks as JSON")
    args = parser.parse_args()

    if not is_llama_cpp(args.source):
        print(f"apply_hooks.py: {args.source} is not a llama.cpp source tree (no ggml/include/ggml.h)", file=sys.stderr)
        return 2
    hooks = load_hooks()
    try:
        hooked = hooked_files(args.source, hooks)
        changed = synchronize(args.source, args.dest, hooked) if args.dest else 0
        if args.report:
            entries = [
                {"name": h.name, "file": h.file, "lines": h.n_lines, "why": h.why, "test": h.test} for h in hooks
            ]
            args.report.write_text(json.dumps(entries, indent=2) + "\n")
    except HookError as error:
        print(f"apply_hooks.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"apply_hooks.py: {error}. The copy is incomplete; the next run completes it.", file=sys.stderr)
        return 2
    lines = sum(hook.n_lines for hook in hooks)
    print(f"{len(hooks)} hooks, {lines} lines in {len(hooked)} files; {changed} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
