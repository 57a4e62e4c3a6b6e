"""The bundled llama-perplexity, against which the driver's numbers are held."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from turbokv import engine, native

ATTEMPTS = 5


def run(model: Path, text: Path, n_ctx: int, n_windows: int, *arguments: str | Path, until: str) -> str:
    """Its output, once it has a line that matches `until`.

    It is started again when the line is missing: its logger writes from a thread that nobody waits for at exit, and
    now and then the last lines, or all of them, are lost.
    """
    shape = f"-c {n_ctx} -b {min(n_ctx, engine.MAX_BATCH)} --chunks {n_windows} -t {engine.default_threads()}".split()
    command = [native.tool("llama-perplexity"), "-m", model, "-f", text, *shape, *arguments]
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if re.search(until, done.stdout + done.stderr):
            return done.stdout + done.stderr
    raise AssertionError(f"status {done.returncode}, no '{until}' in: {(done.stdout + done.stderr)[-2000:]}")


def number(pattern: str, text: str) -> float:
    """The number behind a pattern in the output."""
    found = re.search(pattern + r"\s*([\d.]+)", text)
    assert found, f"no '{pattern}' in: {text[-2000:]}"
    return float(found[1])


def perplexity(model: Path, text: Path, n_ctx: int, n_windows: int, *arguments: str | Path) -> float:
    final = "Final estimate: PPL ="
    return number(final, run(model, text, n_ctx, n_windows, *arguments, until=final))


def divergence(
    model: Path, text: Path, n_ctx: int, n_windows: int, base: Path, *arguments: str
) -> tuple[float, float, str]:
    """PPL and mean KLD against the logits in `base`, and the whole output."""
    last = "Same top p:"
    output = run(model, text, n_ctx, n_windows, "--kl-divergence", "--kl-divergence-base", base, *arguments, until=last)
    return number(r"Mean PPL\(Q\)\s*:", output), number(r"Mean\s+KLD:", output), output
