"""Speed of caches beside f16: llama-bench in randomized, interleaved rounds.

A round runs every cell, a cache at a depth, once, each as a llama-bench process of its own. Depths come in a random
order and at each depth the caches in a random order, another one every round: caches that are compared run close
together in time, and none always runs first. What slows the machine for a while slows cache and f16 alike, so
ratios are formed within a round and only then summarized.

llama-bench (-p P -n N -d D -r 1) warms up with P tokens on an empty cache, fills the cache with D tokens, keeps a
copy, and measures
    pp  P prompt tokens behind those D, in batches: tokens/s,
    tg  N generated tokens behind the same D (the copy; filled once), one by one: tokens/s.
All token ids are random; speed does not depend on them. For the copy it needs the memory of the cache twice.

Speeds and ratios multiply, so the mean is the geometric one and the 95 % interval is Student's t on logarithms: over
the same rounds the mean of the ratios is the ratio of the means, and no interval reaches zero. The interval covers
what differs from round to round on this machine, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from turbokv import data, native
from turbokv.cache_type import CachePair
from turbokv.doctor import cpu_name
from turbokv.errors import TurbokvError

F16 = CachePair("f16", "f16")


@dataclass(frozen=True)
class Cell:
    """What one llama-bench process measures: a cache, K/V, behind `depth` tokens."""

    cache: str
    depth: int

    def __str__(self) -> str:
        return f"{self.cache} at depth {self.depth}"


@dataclass(frozen=True)
class Sample:
    """One cell in one round, a line of the samples file. pp and tg in tokens/s, None if they were not asked for;
    seconds is how long the whole process took."""

    round: int  # from 1
    cache: str
    depth: int
    pp: float | None
    tg: float | None
    seconds: float

    @property
    def cell(self) -> Cell:
        return Cell(self.cache, self.depth)


@dataclass(frozen=True)
class Plan:
    """What to measure. n_prompt, n_gen and depths in tokens; timeout in seconds per cell, None for no limit."""

    model: Path
    caches: tuple[str, ...]  # f16/f16 first
    depths: tuple[int, ...]
    n_prompt: int
    n_gen: int
    threads: int
    rounds: int
    seed: int
    timeout: float | None = None

    def order(self, round_number: int) -> list[Cell]:
        """The cells of a round, from 1, in the order in which they run."""
        rng = random.Random(f"{self.seed} {round_number}")
        depths = rng.sample(self.depths, len(self.depths))
        return [Cell(cache, depth) for depth in depths for cache in rng.sample(self.caches, len(self.caches))]

    def n_tokens(self, cell: Cell) -> int:
        """Tokens that the process of a cell computes, warm-up included."""
        return cell.depth + 2 * self.n_prompt + self.n_gen + 1


@dataclass(frozen=True)
class Step:
    """What begins now: a cell of a round (from 1), after `done` of `total` measurements. `left` is about how many
    seconds it and all that follow take, None before anything is measured."""

    round: int
    cell: Cell
    done: int
    total: int
    left: float | None


class CellFailed(Exception):
    """llama-bench did not measure this cell; the message is the reason. Others may work."""


# --- what the user asks for


def with_f16(pairs: Iterable[CachePair]) -> tuple[str, ...]:
    """The caches by name, each once, f16 first: it is the anchor and always runs."""
    return tuple(dict.fromkeys(map(str, (F16, *pairs))))


def parse_depths(text: str) -> tuple[int, ...]:
    """Parses `0,2048,8192`: tokens that the cache already holds. Raises TurbokvError."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not re.fullmatch("[0-9]{1,9}", item):
            raise TurbokvError(f"'{item}' is not a depth: write numbers of tokens, such as --depth 0,2048,8192")
    return tuple(dict.fromkeys(map(int, items)))


def check_model(path: Path) -> None:
    """Raises TurbokvError for what cannot be a model, before anything runs."""
    if not path.is_file():
        raise TurbokvError(f"there is no model at {path}")
    if "," in str(path):
        raise TurbokvError(f"llama-bench takes the comma in {path} for the end of the name: rename it, or make a link")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TurbokvError(f"{path} is no GGUF model, it does not begin with GGUF. Is the download complete?")


def n_ctx_train(model: Path) -> int | None:
    """Tokens of context that the model was trained on; None if its header does not say so, or is not understood."""
    import gguf  # slow to import

    try:
        reader = gguf.GGUFReader(model)
        architecture = reader.fields["general.architecture"].contents()
        return int(reader.fields[f"{architecture}.context_length"].contents())
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None  # only for a note; whether the model works says llama-bench


# --- samples, and the file that keeps them


def settings(plan: Plan) -> dict[str, Any]:
    """What must be the same for samples to be summarized together. Only the number of rounds may change."""
    try:
        stat, build = plan.model.stat(), native.build_id()
    except OSError as error:
        raise TurbokvError(f"cannot read {error.filename}: {error.strerror}") from None
    return {
        "model": plan.model.name,
        "model_bytes": stat.st_size,
        "model_mtime_ns": stat.st_mtime_ns,
        "cpu": cpu_name(),
        "upstream_commit": native.build_info()["upstream_commit"],
        "build": build,
        "threads": plan.threads,
        # How idle threads wait: "passive" costs a wake-up at every operation, and spinning ones a core from others.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "n_prompt": plan.n_prompt,
        "n_gen": plan.n_gen,
        "caches": list(plan.caches),
        "depths": list(plan.depths),
        "seed": plan.seed,
    }


def samples_path(json_file: Path) -> Path | None:
    """Where the samples for a --json file are kept; None if that is a device or a pipe."""
    return json_file.with_name(json_file.name + ".samples") if json_file.is_file() or not json_file.exists() else None


class SamplesFile:
    """JSON lines: the settings, then one line per sample. It is whole after every append(), so that a run that was
    killed goes on from there. Without a path nothing is kept."""

    def __init__(self, path: Path | None, current: dict[str, Any]) -> None:
        """Raises TurbokvError if the file is damaged or holds samples of other settings."""
        self.path = path
        self.samples: list[Sample] = []
        self._header = json.dumps({"settings": current}) + "\n"
        self._content = ""  # of the file, as this process knows it
        if path and path.exists():
            self._load(path, current)

    def _load(self, path: Path, current: dict[str, Any]) -> None:
        content, number = path.read_text(errors="replace"), 1
        try:
            first, *lines = content.splitlines()
            recorded = dict(json.loads(first)["settings"])
            for line in lines:
                number += 1
                self.samples.append(Sample(**json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise TurbokvError(
                f"{path} is damaged in line {number}: name another --json to keep it, or delete it to start again"
            ) from None
        if recorded != current:
            raise TurbokvError(
                f"{path} holds other measurements, {_differences(recorded, current)}: name another --json to keep "
                "them, or delete it to start again"
            )
        self._content = content

    def append(self, sample: Sample) -> None:
        """Adds a sample, on disk first. Raises TurbokvError; then the file is as it was."""
        content = (self._content or self._header) + json.dumps(asdict(sample)) + "\n"
        if self.path:
            if (self.path.read_text() if self.path.exists() else "") != self._content:
                raise TurbokvError(f"{self.path} was changed by something else: is the same command running twice?")
            data.write_atomically(self.path, content.encode())
        self._content = content
        self.samples.append(sample)


def _differences(recorded: dict[str, Any], current: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(
        f"{key} {show(recorded.get(key))} (now {show(value)})"
        for key, value in current.items()
        if recorded.get(key) != value
    )


# --- measuring


@dataclass
class Measurement:
    """A run: what is asked for, what is measured, and which cells were given up, with the reason."""

    plan: Plan
    file: SamplesFile
    settings: dict[str, Any]
    failed: dict[Cell, str] = field(default_factory=dict)

    def todo(self) -> list[tuple[int, Cell]]:
        """(round, cell) of what is not yet measured, in order."""
        done = {(sample.round, sample.cell) for sample in self.file.samples}
        rounds = range(1, self.plan.rounds + 1)
        return [(n, cell) for n in rounds for cell in self.plan.order(n) if (n, cell) not in done]

    def finished_rounds(self, depth: int) -> set[int]:
        """Rounds in which nothing is left to measure at this depth."""
        open_rounds = {n for n, cell in self.todo() if cell.depth == depth and cell not in self.failed}
        return set(range(1, self.plan.rounds + 1)) - open_rounds


def start(plan: Plan, json_file: Path | None) -> Measurement:
    """A measurement with the samples that earlier runs left beside `json_file`. Raises TurbokvError for all that can
    be known to fail before the long work."""
    if plan.n_prompt == plan.n_gen == 0:
        raise TurbokvError("--n-prompt 0 --n-gen 0 measures nothing: give one of them a number of tokens")
    check_model(plan.model)
    path = samples_path(json_file) if json_file else None
    for file in filter(None, (json_file, path)):
        data.check_writable(file)
    current = settings(plan)
    return Measurement(plan, SamplesFile(path, current), current)


def measure(
    run: Measurement,
    on_start: Callable[[Step], None],
    on_failure: Callable[[Cell, str], None],
) -> None:
    """Runs what is left to do, and adds it to `run`.

    `on_start` is called before each cell, `on_failure` with the reason when a cell is given up, which later rounds then
    leave out. Raises KeyboardInterrupt, and TurbokvError when nothing else could be measured either; `run` keeps what
    it has.
    """
    todo = run.todo()
    total = run.plan.rounds * len(run.plan.order(1))
    while todo:
        number, cell = todo[0]
        left = seconds_left(run.plan, run.file.samples, [cell for _, cell in todo])
        on_start(Step(number, cell, total - len(todo), total, left))
        started = time.monotonic()
        try:
            speeds = bench(run.plan, cell)
        except CellFailed as error:
            run.failed[cell] = f"round {number}: {error}"
            on_failure(cell, run.failed[cell])
            total -= sum(other == cell for _, other in todo)
            todo = [(n, other) for n, other in todo if other != cell]
            continue
        seconds = round(time.monotonic() - started, 3)
        if (now := settings(run.plan)) != run.settings:
            raise TurbokvError(f"changed while it was measured: {_differences(run.settings, now)}. Start again")
        run.file.append(Sample(number, cell.cache, cell.depth, *speeds, seconds))
        todo.pop(0)


def bench(plan: Plan, cell: Cell) -> tuple[float | None, float | None]:
    """Runs llama-bench once: (pp, tg) in tokens/s. Raises CellFailed, or TurbokvError if no cell can work."""
    k, v = cell.cache.split("/")
    tests = {"n_prompt": plan.n_prompt, "n_gen": plan.n_gen}
    command = [
        *(native.tool("llama-bench"), "-m", plan.model, "-ctk", k, "-ctv", v, "-fa", "on"),
        *("-p", plan.n_prompt, "-n", plan.n_gen, "-d", cell.depth, "-r", 1, "-t", plan.threads, "-o", "jsonl"),
    ]
    try:
        process = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=plan.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CellFailed(f"not finished within --timeout {plan.timeout:g} seconds") from None
    except OSError as error:
        raise TurbokvError(f"{command[0]} cannot be started: {error.strerror}. Is it being rebuilt?") from error
    if process.returncode == -signal.SIGINT:
        raise KeyboardInterrupt  # Ctrl-C goes to both processes; this one may see the end of the other first
    if process.returncode:
        reason = _reason(process)
        if "failed to load model" in process.stderr:
            raise TurbokvError(f"{plan.model} cannot be loaded: {reason}. Is the download complete?")
        raise CellFailed(reason)
    speeds = {name: _speed(process.stdout, name, n_tokens) for name, n_tokens in tests.items()}
    return speeds["n_prompt"], speeds["n_gen"]


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """Why it failed. Without -v it prints errors only, the cause first; what an abort adds behind it is a backtrace."""
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    said = "; ".join(lines[:3])
    if process.returncode > 0:
        return said or f"llama-bench ended with status {process.returncode} and gave no reason"
    number = -process.returncode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (out of memory? A smaller --depth takes less)" if number == signal.SIGKILL else ""
    return f"llama-bench was killed by {name}{hint}" + (f": {said}" if said else "")


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


def seconds_left(plan: Plan, samples: list[Sample], todo: list[Cell]) -> float | None:
    """About how long the cells of `todo` take: each as long as it took so far, else as others at that depth, else by
    tokens. None before the first sample."""
    if not samples:
        return None
    own: dict[object, list[float]] = {}
    for sample in samples:
        for key in (sample.cell, sample.depth):
            own.setdefault(key, []).append(sample.seconds)
    per_token = sum(s.seconds for s in samples) / sum(plan.n_tokens(s.cell) for s in samples)

    def estimate(cell: Cell) -> float:
        known = own.get(cell) or own.get(cell.depth)
        return sum(known) / len(known) if known else per_token * plan.n_tokens(cell)

    return sum(map(estimate, todo))


# --- summary


def geometric_mean_ci95(values: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Geometric mean of positive values, and its 95 % interval by Student's t on their logarithms, (low, high). One
    value has no interval: None."""
    logs = np.log(values)
    mean = float(logs.mean())
    if len(logs) < 2:
        return math.exp(mean), None
    half = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def records(run: Measurement) -> list[dict[str, Any]]:
    """One dict per cache and depth, the lines of --json; cells with neither a finished round nor an error are left out.

    cache          as asked for, K/V (the context may take the _64 type, see `turbokv kld`)
    depth          tokens in the cache before what is measured
    tg, pp         generation and prompt processing, null if nothing was measured:
      mean         tokens/s, > 0, geometric mean over the rounds
      ci95         [low, high] of it in tokens/s, null with less than 2 rounds
      ratio_f16    geometric mean over the rounds of (this cache / f16 in the same round), > 0, above 1 is faster than
                   f16; null if f16 has no round in common
      ratio_ci95   [low, high] of it, null with less than 2 such rounds
    n_gen, n_prompt    tokens per tg and pp measurement
    threads            CPU threads
    rounds             rounds that these numbers summarize: the finished ones of this cell
    samples            those rounds: `round` from 1, `pp` and `tg` in tokens/s
    error              why the cell was given up, and in which round; null if it was not
    model, cpu, upstream_commit, build, seed    file name, CPU, llama.cpp, native.build_id(), --seed
    OMP_WAIT_POLICY    as set in the environment, empty if it is not
    """
    out: list[dict[str, Any]] = []
    for depth in run.plan.depths:
        finished = run.finished_rounds(depth)
        samples = [s for s in run.file.samples if s.depth == depth and s.round in finished]
        anchor = {s.round: s for s in samples if s.cache == str(F16)}
        for cache in run.plan.caches:
            own = sorted((s for s in samples if s.cache == cache), key=lambda s: s.round)
            error = run.failed.get(Cell(cache, depth))
            if not own and error is None:
                continue
            out.append(
                {
                    "cache": cache,
                    "depth": depth,
                    "tg": _summary([(s.round, s.tg) for s in own], {n: s.tg for n, s in anchor.items()}),
                    "pp": _summary([(s.round, s.pp) for s in own], {n: s.pp for n, s in anchor.items()}),
                    "n_gen": run.plan.n_gen,
                    "n_prompt": run.plan.n_prompt,
                    "threads": run.plan.threads,
                    "rounds": len(own),
                    "samples": [{"round": s.round, "pp": s.pp, "tg": s.tg} for s in own],
                    "error": error,
                    **{
                        key: run.settings[key]
                        for key in ("model", "cpu", "OMP_WAIT_POLICY", "upstream_commit", "build", "seed")
                    },
                }
            )
    return out


def _summary(own: list[tuple[int, float | None]], f16: dict[int, float | None]) -> dict[str, Any] | None:
    """Summary of speeds by round; None if there are none."""
    speeds = [(number, speed) for number, speed in own if speed is not None]
    if not speeds:
        return None
    mean, ci95 = geometric_mean_ci95([speed for _, speed in speeds])
    ratios = [speed / anchor for number, speed in speeds if (anchor := f16.get(number)) is not None]
    ratio, ratio_ci95 = geometric_mean_ci95(ratios) if ratios else (None, None)
    return {"mean": mean, "ci95": ci95, "ratio_f16": ratio, "ratio_ci95": ratio_ci95}
