"""`turbokv doctor`: what is built, where it lies, and whether it is sound."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from turbokv import __version__, cache_type, data, native
from turbokv.errors import TurbokvError
from turbokv.spec import TYPES

TOOLS = (
    "llama-server",
    "llama-cli",
    "llama-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-gguf-split",
    "ggml-rpc-server",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is None for plain facts."""

    name: str
    value: str
    ok: bool | None = None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _tool_works(name: str) -> Finding:
    try:
        path = native.tool(name)
        # --help exits with 0 or 1 depending on the tool; only a tool that cannot start is a finding
        run = subprocess.run([path, "--help"], capture_output=True, timeout=60, check=False)
    except (TurbokvError, OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, str(error), False)
    started = run.returncode in (0, 1) and bool(run.stdout + run.stderr)
    return Finding(name, str(path) if started else f"{path} does not start (status {run.returncode})", started)


def _types_registered() -> Finding:
    found = cache_type.type_ids()
    wrong = [
        t.name for t in TYPES if found.get(t.name) != t.type_id or cache_type.bits_per_value(t.name) != t.bits_per_value
    ]
    return Finding(
        "types", f"wrong or missing: {', '.join(wrong)}" if wrong else ", ".join(t.name for t in TYPES), not wrong
    )


def _features() -> str:
    llama = native.llama()
    return str(llama.llama_print_system_info().decode().strip().rstrip("|").strip())


def findings() -> Iterator[Finding]:
    """All findings, cheap ones first. A broken build gives findings with ok=False, not an exception."""
    yield Finding("turbokv", __version__)
    try:
        info = native.build_info()
        yield Finding("native folder", str(native.native_dir()), True)
    except TurbokvError as error:
        yield Finding("native folder", str(error), False)
        return
    yield Finding("llama.cpp", f"{info['upstream_commit']} ({info['upstream_source']})")
    yield Finding("compiler", f"{info['compiler']}, {info['build_type']}")
    hooks = info["hooks"]
    lines, files = sum(hook["lines"] for hook in hooks), {hook["file"] for hook in hooks}
    yield Finding("hooks", f"{len(hooks)} hooks, {lines} inserted lines in {len(files)} files")
    for hook in hooks:
        yield Finding(f"  {hook['name']}", f"{hook['file']}: {hook['why']}")
    yield Finding("CPU", f"{_cpu()}, {platform.machine()}")
    if info["bindings"]:
        yield from _library()
    else:
        yield Finding("bindings", "none: this llama.cpp has another llama.h, so ppl and kld refuse; the tools work")
    for name in TOOLS:
        yield _tool_works(name)
    for path in (data.MINI, data.BIAS, data.SAMPLE):
        yield Finding(path.name, str(path), path.is_file())


def _library() -> Iterator[Finding]:
    try:
        yield Finding("libllama", str(Path(native.llama()._lib._name)), True)
        yield Finding("CPU features", _features())
        yield _types_registered()
    except TurbokvError as error:
        yield Finding("libllama", str(error), False)
