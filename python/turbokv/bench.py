"""One llama-bench process: speeds out of its JSON, and why it failed if it did."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from turbokv import native
from turbokv.cell import Cell, CellFailed, Plan
from turbokv.closing import child
from turbokv.energy import Meter
from turbokv.errors import TurbokvError, signal_name

POLL = 0.05  # seconds between two looks at the process; less at its start


@dataclass(frozen=True)
class Measured:
    """What one process gave; the fields are those of samples.Sample."""

    pp: float | None
    tg: float | None
    peak_bytes: int | None = None
    joules: float | None = None
    latencies: list[float] | None = None


def peak_bytes(pid: int) -> int | None:
    """Largest resident memory so far of a running process, mapped pages of the model included; None where the
    platform has no /proc. (wait4's ru_maxrss is no smaller than that of the process that forked it: of no use.)
    Whoever looks now and then misses what a process takes between the last look and its end."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None  # a process that ended has none


def bench(plan: Plan, cell: Cell, meter: Meter | None = None) -> Measured:
    """Runs llama-bench once. Raises CellFailed, or TurbokvError if no cell can work."""
    k, v = cell.cache.split("/")
    command = [
        *(native.tool("llama-bench"), "-m", plan.model, "-ctk", k, "-ctv", v, "-fa", "on"),
        *plan.placement.bench_arguments(),
        *("-p", plan.n_prompt, "-n", plan.n_gen, "-d", cell.depth, "-r", 1, "-t", plan.threads, "-o", "jsonl"),
    ]
    joules_before = meter.joules() if meter else None
    status, output, errors, peak = _run(list(map(str, command)), plan.timeout, meter)
    joules_after = meter.joules() if meter else None
    if status == -signal.SIGINT:
        raise KeyboardInterrupt  # Ctrl-C goes to both processes; this one may see the end of the other first
    if status:
        reason = _reason(status, errors)
        if "failed to load model" in errors:
            raise TurbokvError(f"{plan.model} cannot be loaded: {reason}. Is the download complete?")
        raise CellFailed(reason)
    return Measured(
        pp=_speed(output, "n_prompt", plan.n_prompt),
        tg=_speed(output, "n_gen", plan.n_gen),
        peak_bytes=peak,
        joules=joules_after - joules_before if joules_after is not None and joules_before is not None else None,
    )


def _run(command: list[str], timeout: float | None, meter: Meter | None) -> tuple[int, str, str, int | None]:
    """Status, stdout, stderr and largest resident memory of a process. Raises CellFailed when it takes too long,
    TurbokvError when it cannot be started; whatever is raised, the process has ended."""
    peak: int | None = None
    started = time.monotonic()
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with child(command, **pipes) as process:
        delay = POLL / 25
        while True:
            peak = max(filter(None, (peak, peak_bytes(process.pid))), default=None)
            if meter:
                meter.joules()
            if timeout is not None and time.monotonic() - started > timeout:
                raise CellFailed(f"not finished within --timeout {timeout:g} seconds")
            try:
                output, errors = process.communicate(timeout=delay)
                return process.returncode, output, errors, peak
            except subprocess.TimeoutExpired:
                delay = min(2 * delay, POLL)


def _reason(status: int, errors: str) -> str:
    """Why it failed. Without -v it prints errors only, the cause first; what an abort adds behind it is a backtrace."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = "; ".join(lines[:3])
    if status > 0:
        return said or f"llama-bench ended with status {status} and gave no reason"
    number = -status
    hint = " (out of memory? A smaller --depth takes less)" if number == signal.SIGKILL else ""
    return f"llama-bench was killed by {signal_name(number)}{hint}" + (f": {said}" if said else "")


def _speed(output: str, test: str, n_tokens: int) -> float | None:
    """Tokens/s of the test with n_prompt or n_gen tokens, out of llama-bench's JSON lines; None for no tokens."""
    if n_tokens == 0:
        return None
    try:
        rows = [json.loads(line) for line in output.splitlines() if line.strip()]
        (nanoseconds,) = (row["avg_ns"] for row in rows if row[test] == n_tokens)
        return 1e9 * n_tokens / int(nanoseconds)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise CellFailed(f"llama-bench printed no result with {test} {n_tokens}: {output[:200]!r}") from None
