"""Speed of caches beside f16: llama-bench in randomized, interleaved rounds.

A round runs every cell, a cache at a depth, once, each as a llama-bench process of its own. Depths come in a random
order and at each depth the caches in a random order, another one every round: caches that are compared run close
together in time, and none always runs first. What slows the machine for a while slows cache and f16 alike, so
ratios are formed within a round and only then summarized.

llama-bench (-p P -n N -d D -r 1) warms up with P tokens on an empty cache, fills the cache with D tokens, keeps a
copy, and measures
    pp  P prompt tokens behind those D, in batches: tokens/s,
    tg  N generated tokens behind the same D (the copy; filled once), one by one: tokens/s.
All token ids are random; speed does not depend on them. For the copy it needs the memory of the cache twice. With
--parallel the cells of throughput.py, a llama-server each, run in the same rounds.

Speeds and ratios multiply, so the mean is the geometric one and the 95 % interval is Student's t on logarithms: over
the same rounds the mean of the ratios is the ratio of the means, and no interval reaches zero. The interval covers
what differs from round to round on this machine, nothing else.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from turbokv import data, memory, native, throughput
from turbokv.bench import bench
from turbokv.cache_type import F16, CachePair, bits_per_value, parse_pairs
from turbokv.cell import Cell, CellFailed, Plan, Step
from turbokv.doctor import cpu_name
from turbokv.energy import Meter
from turbokv.errors import CacheRefused, TurbokvError
from turbokv.samples import Sample, SamplesFile, differences, samples_path

if TYPE_CHECKING:
    from turbokv import record  # slow to import

DRIFT = 0.03  # a run whose anchor moves more than this says so


# --- what the user asks for


def with_f16(pairs: Iterable[CachePair]) -> tuple[str, ...]:
    """The caches by name, each once, f16 first: it is the anchor and always runs."""
    return tuple(dict.fromkeys(map(str, (F16, *pairs))))


def parse_depths(text: str) -> tuple[int, ...]:
    """Parses `0,2048,8192`: tokens that the cache already holds; `none` leaves llama-bench out. Raises TurbokvError."""
    if text.strip() == "none":
        return ()
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not re.fullmatch("[0-9]{1,9}", item):
            raise TurbokvError(f"'{item}' is not a depth: write numbers of tokens, such as --depth 0,2048,8192")
    return tuple(dict.fromkeys(map(int, items)))


def parse_parallel(text: str | None) -> tuple[int, ...]:
    """Parses `1,4`: requests at a time. Raises TurbokvError."""
    items = [item.strip() for item in text.split(",")] if text is not None else []
    for item in items:
        if not re.fullmatch("[1-9][0-9]{0,2}", item) or int(item) > 256:  # LLAMA_MAX_SEQ
            raise TurbokvError(
                f"'{item}' is not a number of requests: write numbers from 1 to 256, such as --parallel 1,4"
            )
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
        **({"parallel": list(plan.parallel)} if plan.parallel else {}),
        **plan.placement.identity(),
    }


# --- measuring


@dataclass(frozen=True)
class Context:
    """What a cell gets from llama.cpp: the types that serve its cache, and its bytes."""

    effective: CachePair
    kv_bytes: int


@dataclass
class Measurement:
    """A run: what is asked for, what is measured, and which cells were given up, with the reason."""

    plan: Plan
    file: SamplesFile
    settings: dict[str, Any]
    contexts: dict[Cell, Context] = field(default_factory=dict)  # without those that the model refuses
    meter: Meter = field(default_factory=lambda: Meter(with_gpus=False))
    failed: dict[Cell, str] = field(default_factory=dict)

    def todo(self) -> list[tuple[int, Cell]]:
        """(round, cell) of what is not yet measured, in order."""
        done = {(sample.round, sample.cell) for sample in self.file.samples}
        rounds = range(1, self.plan.rounds + 1)
        return [(n, cell) for n in rounds for cell in self.plan.order(n) if (n, cell) not in done]

    def finished_rounds(self, group: tuple[int, int | None]) -> set[int]:
        """Rounds in which nothing of this group is left to measure."""
        open_rounds = {n for n, cell in self.todo() if cell.group == group and cell not in self.failed}
        return set(range(1, self.plan.rounds + 1)) - open_rounds


def start(plan: Plan, json_file: Path | None) -> Measurement:
    """A measurement with the samples that earlier runs left beside `json_file`. Raises TurbokvError for all that can
    be known to fail before the long work."""
    if plan.n_prompt == plan.n_gen == 0:
        raise TurbokvError("--n-prompt 0 --n-gen 0 measures nothing: give one of them a number of tokens")
    if plan.parallel and not (plan.n_prompt and plan.n_gen):
        raise TurbokvError("--parallel needs prompts and answers: give --n-prompt and --n-gen at least 1 token")
    if not plan.groups:
        raise TurbokvError("--depth none without --parallel measures nothing: give one of them")
    check_model(plan.model)
    path = samples_path(json_file) if json_file else None
    for file in filter(None, (json_file, path)):
        data.check_writable(file)
    current, meter = settings(plan), Meter(with_gpus=plan.placement.on_gpu)
    return Measurement(plan, SamplesFile(path, current), current, contexts(plan), meter)


def contexts(plan: Plan) -> dict[Cell, Context]:
    """The context of each cell, without the cells that the model refuses; empty where nothing can be asked. Raises
    CacheRefused if nothing is left to measure beside f16."""
    found: dict[Cell, Context] = {}
    refused: dict[Cell, CacheRefused] = {}
    cells = plan.order(1)
    try:
        with memory.Sizes(plan.model, plan.placement) as sizes:
            for cell in cells:
                (pair,) = parse_pairs(cell.cache)
                try:
                    effective = sizes.model.effective(pair)
                    found[cell] = Context(effective, sizes.usage(pair, plan.n_ctx(cell), cell.parallel or 1).kv)
                except CacheRefused as refusal:
                    refused[cell] = refusal
                except TurbokvError:
                    continue  # llama-bench will say why
    except TurbokvError:
        return {}
    wanted = [cell for cell in cells if cell.cache != str(F16)]
    if wanted and all(cell in refused for cell in wanted):
        raise refused[wanted[0]]
    return found


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
            if cell.parallel:
                measured = throughput.serve(run.plan, cell, number, run.meter)
            else:
                measured = bench(run.plan, cell, run.meter)
        except CellFailed as error:
            run.failed[cell] = f"round {number}: {error}"
            on_failure(cell, run.failed[cell])
            total -= sum(other == cell for _, other in todo)
            todo = [(n, other) for n, other in todo if other != cell]
            continue
        seconds = round(time.monotonic() - started, 3)
        if (now := settings(run.plan)) != run.settings:
            raise TurbokvError(f"changed while it was measured: {differences(run.settings, now)}. Start again")
        run.file.append(
            Sample(number, cell.cache, cell.depth, seconds=seconds, parallel=cell.parallel, **asdict(measured))
        )
        todo.pop(0)


def seconds_left(plan: Plan, samples: list[Sample], todo: list[Cell]) -> float | None:
    """About how long the cells of `todo` take: each as long as it took so far, else as others at that depth (or
    of so many requests), else by tokens. None before the first sample."""
    if not samples:
        return None
    own: dict[object, list[float]] = {}
    for sample in samples:
        for key in (sample.cell, sample.cell.group):
            own.setdefault(key, []).append(sample.seconds)
    per_token = sum(s.seconds for s in samples) / sum(plan.n_tokens(s.cell) for s in samples)

    def estimate(cell: Cell) -> float:
        known = own.get(cell) or own.get(cell.group)
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


@dataclass(frozen=True)
class Drift:
    """How f16, the anchor, moved over the rounds of one test: spread is the fastest round over the slowest - 1, trend
    the change from the first round to the last on a line through the logarithms, below 0 for slower."""

    where: str
    spread: float
    trend: float

    def __str__(self) -> str:
        moved = f"{abs(self.trend):.0%} {'slower' if self.trend < 0 else 'faster'} from the first round to the last"
        return f"{self.where}: {self.spread:.0%} between rounds" + (f", {moved}" if abs(self.trend) > DRIFT else "")


def drifts(run: Measurement) -> list[Drift]:
    """Where f16's own speed differs by more than 3 % between rounds. Ratios are formed within a round and do not
    follow it, but tokens/s and their intervals do."""
    found = []
    for group in run.plan.groups:
        anchor = sorted((s for s in run.file.samples if s.cell == Cell(str(F16), *group)), key=lambda s: s.round)
        for test in ("tg", "pp"):
            speeds = [(s.round, v) for s in anchor if s.round <= run.plan.rounds and (v := getattr(s, test))]
            if len(speeds) < 2:
                continue
            rounds, logs = np.array([n for n, _ in speeds]), np.log([v for _, v in speeds])
            slope = float(np.polyfit(rounds, logs, 1)[0])
            where = str(Cell("f16", *group)).replace("f16", f"{test} of f16", 1)
            drift = Drift(where, math.exp(np.ptp(logs)) - 1, math.expm1(slope * float(np.ptp(rounds))))
            if drift.spread > DRIFT:
                found.append(drift)
    return found


def records(run: Measurement) -> list[record.SpeedResult | record.ServerResult]:
    """One result per cache and depth, then one per cache and number of requests: the lines of --json. Cells with
    neither a finished round nor an error are left out. See the models for what the fields mean."""
    out: list[record.SpeedResult | record.ServerResult] = []
    for group in run.plan.groups:
        finished = run.finished_rounds(group)
        samples = [s for s in run.file.samples if s.cell.group == group and s.round in finished]
        anchor = {s.round: s for s in samples if s.cache == str(F16)}
        for cache in run.plan.caches:
            own = sorted((s for s in samples if s.cache == cache), key=lambda s: s.round)
            cell = Cell(cache, *group)
            if own or cell in run.failed:
                out.append((_server_result if cell.parallel else _speed_result)(run, cell, own, anchor))
    return out


def _common(run: Measurement, cell: Cell, own: list[Sample]) -> dict[str, Any]:
    """What both kinds of results have. Energy is per token that is computed by llama-bench, generated by a server."""
    plan = run.plan
    joules = [s.joules for s in own if s.joules is not None]
    per_round = plan.n_requests(cell) * plan.n_gen if cell.parallel else plan.n_tokens(cell)
    keys = ("model", "cpu", "OMP_WAIT_POLICY", "upstream_commit", "build", "seed")
    return {
        "n_gen": plan.n_gen,
        "n_prompt": plan.n_prompt,
        "threads": plan.threads,
        "rounds": len(own),
        "peak_bytes": max((s.peak_bytes for s in own if s.peak_bytes is not None), default=None),
        "kv_bytes": context.kv_bytes if (context := run.contexts.get(cell)) else None,
        "joules_per_token": sum(joules) / len(joules) / per_round if joules else None,
        "error": run.failed.get(cell),
        "device": plan.placement.device,
        "gpu_layers": plan.placement.gpu_layers,
        **{key: run.settings[key] for key in keys},
    }


def _speed_result(run: Measurement, cell: Cell, own: list[Sample], anchor: dict[int, Sample]) -> record.SpeedResult:
    from turbokv import record

    samples = [
        record.SpeedSample(round=s.round, pp=s.pp, tg=s.tg, peak_bytes=s.peak_bytes, joules=s.joules) for s in own
    ]
    tg, pp = (_summary(own, anchor, test) for test in ("tg", "pp"))
    return record.SpeedResult(
        cache=cell.cache, depth=cell.depth, tg=tg, pp=pp, samples=samples, **_common(run, cell, own)
    )


def _server_result(run: Measurement, cell: Cell, own: list[Sample], anchor: dict[int, Sample]) -> record.ServerResult:
    from turbokv import record

    tg, pp = _summary(own, anchor, "tg"), _summary(own, anchor, "pp")
    latencies = [seconds for s in own for seconds in s.latencies or []]
    p50, p95 = (float(np.percentile(latencies, p)) if latencies else None for p in (50, 95))
    samples = [
        record.ServerSample(
            round=s.round,
            tokens_per_second=s.tg or 0.0,
            prompt_tokens_per_second=s.pp or 0.0,
            latencies=s.latencies or [],
            peak_bytes=s.peak_bytes,
            joules=s.joules,
        )
        for s in own
    ]
    context = run.contexts.get(cell)
    return record.ServerResult(
        cache=str(context.effective) if context else cell.cache,
        requested=cell.cache,
        bits_k=bits_per_value(context.effective.k) if context else None,
        bits_v=bits_per_value(context.effective.v) if context else None,
        parallel=cell.parallel or 0,
        requests=run.plan.n_requests(cell),
        tokens_per_second=tg.mean if tg else None,
        ci95=tg.ci95 if tg else None,
        prompt_tokens_per_second=pp.mean if pp else None,
        ratio_f16=tg.ratio_f16 if tg else None,
        ratio_ci95=tg.ratio_ci95 if tg else None,
        latency_p50=p50,
        latency_p95=p95,
        samples=samples,
        **_common(run, cell, own),
    )


def _summary(own: list[Sample], anchor: dict[int, Sample], test: str) -> record.Speed | None:
    """Summary of `test`, tg or pp, with the ratio to the anchor's in the same round; None if there is nothing."""
    from turbokv import record

    speeds = {s.round: value for s in own if (value := getattr(s, test)) is not None}
    f16 = {n: value for n, s in anchor.items() if (value := getattr(s, test)) is not None}
    if not speeds:
        return None
    mean, ci95 = geometric_mean_ci95(list(speeds.values()))
    ratios = [speed / f16[n] for n, speed in speeds.items() if n in f16]
    ratio, ratio_ci95 = geometric_mean_ci95(ratios) if ratios else (None, None)
    return record.Speed(mean=mean, ci95=ci95, ratio_f16=ratio, ratio_ci95=ratio_ci95)
