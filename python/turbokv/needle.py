"""Needle in a haystack: does a model still find what stands far back when its cache is compressed?

Nothing is generated. The answers are decoded behind the question, the right one and the wrong ones, and their
log-probabilities are compared: an answer is right when each of its tokens is the most likely one, which is what greedy
decoding would give, and the margin says by how much it leads, where retrieval alone is all right or all wrong.
Log-probabilities are sums over the tokens of a word; what ends a word is not counted, because no answer is the
beginning of another. Every haystack is decoded once per cache, f16 first as the reference; the questions are decoded
behind it and cut off again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbokv import native
from turbokv.cache_type import F16, CachePair, bits_per_value
from turbokv.engine import Context, Model
from turbokv.haystack import TASKS, Haystack, Plan, Question, Tokens, alternatives
from turbokv.reference import log_normalizer
from turbokv.stats import cluster_bootstrap_ci95

if TYPE_CHECKING:  # pydantic is slow to import
    from turbokv import record


@dataclass(frozen=True)
class Answer:
    """How one question was answered. The margin is in nats, NaN where a logit was not finite."""

    right: bool
    margin: float


@dataclass
class CacheRun:
    """What was measured for one cache so far."""

    requested: CachePair
    effective: CachePair
    cache_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # per haystack
    answers: list[list[Answer]] = field(default_factory=list)  # per haystack, one per question


@dataclass
class Measurement:
    """A whole run. `again` is whether haystacks had to be decoded again for every question."""

    haystacks: list[Haystack]
    reference: CacheRun
    runs: list[CacheRun]
    again: bool = False

    @property
    def finished(self) -> int:
        """Haystacks that every cache has finished."""
        return min(len(run.answers) for run in (self.reference, *self.runs))


class _Reader:
    """Decodes what follows a haystack, which stays in the cache."""

    def __init__(self, context: Context, haystack: Tokens) -> None:
        self._context, self._haystack = context, haystack
        self._end = 0  # tokens in the cache
        self.again = False

    def logits(self, before: Tokens, tokens: Tokens, n_logits: int) -> NDArray[np.float64]:
        """Log-probabilities behind each of the last n_logits tokens, decoded behind haystack and `before`, which an
        earlier call has decoded."""
        start = len(self._haystack) + len(before)
        whole = self._end == 0
        if not whole and self._end != start and not self._context.cut(start):
            whole = self.again = True
            self._context.cut(0)
        if whole:
            self._context.append(np.concatenate([self._haystack, before]), 0, 0)
        self._end = start + len(tokens)
        logits = self._context.append(tokens, start, n_logits).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            log_p: NDArray[np.float64] = logits - log_normalizer(logits)[:, None]
        return log_p


def _scores(reader: _Reader, model: Model, text: str, answers: list[str]) -> tuple[list[float], list[bool]]:
    """Log-probability of every answer behind the text, and whether greedy decoding would give it."""
    question, tails = alternatives(model, text, answers)
    first = reader.logits(question[:0], question, 1)
    log_p, greedy = [], []
    for tail in tails:
        rows = first
        if len(tail) > 1:
            rows = np.concatenate([first, reader.logits(question, tail[:-1], len(tail) - 1)])
        log_p.append(float(rows[np.arange(len(tail)), tail].sum()) if np.isfinite(rows).all() else math.nan)
        greedy.append(not math.isnan(log_p[-1]) and bool((rows.argmax(axis=-1) == tail).all()))
    return log_p, greedy


def ask(reader: _Reader, model: Model, question: Question) -> Answer:
    """Scores one question. Of several right words the order is free: each place takes the most likely word that is
    left, and all places must be right; the margin is the mean over the places."""
    text, left = question.text, list(question.right)
    right, margins = True, []
    while left:
        log_p, greedy = _scores(reader, model, text, [*left, *question.wrong])
        n = len(left)
        right &= any(greedy[:n])
        margins.append(max(log_p[:n]) - max(log_p[n:]) if np.isfinite(log_p).all() else math.nan)
        best = greedy.index(True) if any(greedy[:n]) else int(np.argmax(np.nan_to_num(log_p[:n], nan=-math.inf)))
        text += left.pop(best) + ","
    return Answer(right, sum(margins) / len(margins))


def measure(
    model: Model,
    haystacks: list[Haystack],
    pairs: list[CachePair],
    *,
    n_threads: int,
    advance: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Asks every question of every cache; `advance` is called with the name of the pass that just ended.

    On KeyboardInterrupt the haystacks that all caches have finished count; before the first it is raised.
    """
    runs = [CacheRun(pair, model.effective(pair)) for pair in pairs]
    result = Measurement(haystacks, CacheRun(F16, F16), runs)
    n_ctx = max(haystack.length for haystack in haystacks)
    for pair in pairs:  # what cannot work is refused now, not after the reference
        Context(model, pair, min(n_ctx, 256), n_threads).close()
    try:
        for haystack in haystacks:
            for run in (result.reference, *runs):
                started = time.monotonic()
                with Context(model, run.requested, n_ctx, n_threads) as context:
                    reader = _Reader(context, haystack.tokens)
                    answers = [ask(reader, model, question) for question in haystack.questions]
                    run.cache_bytes = context.cache_bytes
                run.answers.append(answers)
                run.seconds.append(time.monotonic() - started)
                result.again |= reader.again
                advance("f16 reference" if run is result.reference else str(run.effective))
    except KeyboardInterrupt:
        if result.finished == 0:
            raise
    return result


def results(measurement: Measurement, plan: Plan, model: Model, text: record.Text) -> list[record.NeedleResult]:
    """One record per cache, over the haystacks that all caches finished."""
    return [_result(measurement, run, plan, model, text) for run in measurement.runs]


def _result(
    measurement: Measurement, run: CacheRun, plan: Plan, model: Model, text: record.Text
) -> record.NeedleResult:
    from turbokv import record

    n = measurement.finished
    trials = [  # per haystack
        [
            record.Trial(
                length=haystack.length,
                depth=question.depth,
                seed=haystack.seed,
                haystack=i,
                right=own.right,
                margin=_finite(own.margin),
                right_f16=reference.right,
                margin_f16=_finite(reference.margin),
            )
            for question, own, reference in zip(
                haystack.questions, run.answers[i], measurement.reference.answers[i], strict=True
            )
        ]
        for i, haystack in enumerate(measurement.haystacks[:n])
    ]
    flat = [trial for haystack in trials for trial in haystack]
    accuracy = _estimate([[float(trial.right) for trial in haystack] for haystack in trials])
    if accuracy.ci95:  # a share; and a bootstrap of equal values has no width and says nothing
        low, high = max(0.0, accuracy.ci95[0]), min(1.0, accuracy.ci95[1])
        accuracy = record.Estimate(mean=accuracy.mean, ci95=(low, high) if low < high else None)
    return record.NeedleResult(
        cache=str(run.effective),
        requested=str(run.requested),
        bits_k=bits_per_value(run.effective.k),
        bits_v=bits_per_value(run.effective.v),
        kv_bytes=run.cache_bytes,
        device=model.placement.device,
        gpu_layers=model.placement.gpu_layers,
        task=plan.task,
        accuracy=accuracy,
        accuracy_f16=_share(trial.right_f16 for trial in flat),
        margin=_estimate([[t.margin for t in haystack if t.margin is not None] for haystack in trials]),
        margin_f16=_mean(t.margin_f16 for t in flat),
        margin_delta=_estimate([[d for t in haystack if (d := _delta(t)) is not None] for haystack in trials]),
        lost=sum(trial.right_f16 and not trial.right for trial in flat),
        gained=sum(trial.right and not trial.right_f16 for trial in flat),
        non_finite=sum(_delta(trial) is None for trial in flat),
        haystacks=n,
        distractors=plan.distractors,
        words=TASKS[plan.task][1],
        template=plan.template.name,
        cells=_cells(flat),
        trials=flat,
        text=text,
        model=model.path.name,
        upstream_commit=native.build_info()["upstream_commit"],
        seconds=round(sum(run.seconds[:n]), 3),
    )


def _cells(trials: list[record.Trial]) -> list[record.NeedleCell]:
    from turbokv import record

    fields = sorted({(trial.length, trial.depth) for trial in trials})
    cells = []
    for length, depth in fields:
        inside = [trial for trial in trials if (trial.length, trial.depth) == (length, depth)]
        cells.append(
            record.NeedleCell(
                length=length,
                depth=depth,
                trials=len(inside),
                accuracy=_share(trial.right for trial in inside),
                margin=_mean(trial.margin for trial in inside),
                accuracy_f16=_share(trial.right_f16 for trial in inside),
                margin_delta=_mean(_delta(trial) for trial in inside),
            )
        )
    return cells


def _delta(trial: record.Trial) -> float | None:
    return None if trial.margin is None or trial.margin_f16 is None else trial.margin - trial.margin_f16


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _estimate(clusters: list[list[float]]) -> record.Estimate:
    """Mean of all values with the interval that drawing haystacks gives."""
    from turbokv import record

    low, high = cluster_bootstrap_ci95([np.array(cluster, np.float64) for cluster in clusters])
    mean = _mean(value for cluster in clusters for value in cluster)
    return record.Estimate(mean=mean, ci95=None if math.isnan(low) else (low, high))
