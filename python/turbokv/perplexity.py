"""Perplexity of a cache type, and its KL divergence from the f16 cache, over windows of a text.

The protocol is llama-perplexity's, so that the numbers can be held against it: the text is cut into windows of
n_ctx tokens, the first token of each is replaced by BOS if the model has one, and positions n_ctx/2 .. n_ctx-2
are scored. Window by window the f16 reference is computed first (for KLD its logits are kept in memory), then every
cache runs on the same window in the same batches. An `f16` among the caches is a second run: the noise floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbokv import native
from turbokv.cache_type import CachePair, bits_per_value
from turbokv.engine import Context, Model
from turbokv.errors import TurbokvError
from turbokv.stats import bootstrap_ci95

F16 = CachePair("f16", "f16")
ROWS = 64  # logit rows handled at a time: float64 copies of more would not stay in the CPU's caches


@dataclass
class Scores:
    """Per-token values of one cache over one window, or over several joined. Arrays are [n_scored]."""

    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]

    @property
    def finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.nll) & np.isfinite(self.kld)


@dataclass
class CacheRun:
    """What was measured for one cache so far."""

    requested: CachePair
    effective: CachePair
    cache_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # per window
    windows: list[Scores] = field(default_factory=list)


@dataclass
class Measurement:
    """A whole run: the reference's per-window NLL and one CacheRun per cache."""

    model: str
    n_ctx: int
    with_kld: bool
    runs: list[CacheRun]
    reference_nll: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def n_windows(self) -> int:
        """Windows that every cache has finished."""
        return min(len(run.windows) for run in self.runs)


def windows(model: Model, tokens: NDArray[np.int32], n_ctx: int, n_windows: int) -> NDArray[np.int32]:
    """The first n_windows windows (all of them if n_windows < 0), int32 [n, n_ctx], with BOS in place."""
    if n_ctx < 16:
        raise TurbokvError(f"a context of {n_ctx} tokens is too short to measure: use -c 512 or more")
    available = len(tokens) // n_ctx
    if available == 0:
        raise TurbokvError(
            f"the text has {len(tokens)} tokens, less than one context of {n_ctx}: give a longer text, or a smaller -c"
        )
    cut = tokens[: n_ctx * (available if n_windows < 0 else min(n_windows, available))].reshape(-1, n_ctx).copy()
    if model.bos is not None:
        cut[:, 0] = model.bos
    return cut


def log_normalizer(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(sum(exp(logits))) over the last axis, [n, n_vocab] -> [n]."""
    top = logits.max(axis=-1)
    shifted: NDArray[np.float64] = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return shifted


def score(logits: NDArray[np.float32], reference: NDArray[np.float32] | None, targets: NDArray[np.int32]) -> Scores:
    """Scores logits [n, n_vocab] against reference logits of the same shape; targets [n] are the true next tokens.

    NLL in nats; KLD = sum p_ref * (log p_ref - log p), in nats. Rows with a NaN or infinite logit score NaN.
    Without a reference the logits are their own: zero divergence, the same top token.
    """
    parts = []
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(targets), ROWS):
            own = logits[i : i + ROWS].astype(np.float64)
            own_log_p = own - log_normalizer(own)[:, None]
            nll = -own_log_p[np.arange(len(own)), targets[i : i + ROWS]]
            nll[~np.isfinite(own).all(axis=-1)] = np.nan
            if reference is None:
                parts.append(Scores(nll, np.zeros(len(own)), np.ones(len(own), bool)))
                continue
            ref = reference[i : i + ROWS].astype(np.float64)
            ref_log_p = ref - log_normalizer(ref)[:, None]
            kld = (np.exp(ref_log_p) * (ref_log_p - own_log_p)).sum(axis=-1)
            parts.append(Scores(nll, kld, own.argmax(axis=-1) == ref.argmax(axis=-1)))
    return join(parts)


def _reference_logits(context: Context, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
    out = np.empty((len(tokens) - first, context.model.n_vocab), np.float32)
    row = 0
    for logits in context.logits(tokens, first):
        out[row : row + len(logits)] = logits
        row += len(logits)
    return out[:-1]  # nothing follows the last position


def _run_window(
    context: Context, tokens: NDArray[np.int32], first: int, reference: NDArray[np.float32] | None
) -> Scores:
    targets = tokens[first + 1 :]
    parts, row = [], 0
    for logits in context.logits(tokens, first):
        n = min(len(logits), len(targets) - row)
        if n > 0:
            compare = None if reference is None else reference[row : row + n]
            parts.append(score(logits[:n], compare, targets[row : row + n]))
        row += n
    return join(parts)


def join(parts: list[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.kld for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )


def measure(
    model: Model,
    tokens: NDArray[np.int32],
    pairs: list[CachePair],
    *,
    n_ctx: int,
    n_windows: int,
    n_threads: int,
    with_kld: bool,
    advance: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Runs every cache over the windows; `advance` is called with the name of the pass that just ended.

    On KeyboardInterrupt the windows that all caches have finished are returned; before the first it is raised.
    """
    result = Measurement(model.path.name, n_ctx, with_kld, [CacheRun(pair, model.effective(pair)) for pair in pairs])
    first = n_ctx // 2
    for pair in pairs:  # what cannot work is refused now, not after the windows before it
        Context(model, pair, min(n_ctx, 256), n_threads).close()
    try:
        for window in windows(model, tokens, n_ctx, n_windows):
            reference = None
            with Context(model, F16, n_ctx, n_threads) as context:
                if with_kld:
                    reference = _reference_logits(context, window, first)
                    scores = score(reference, None, window[first + 1 :])
                else:
                    scores = _run_window(context, window, first, None)
            result.reference_nll.append(scores.nll)
            advance("f16 reference")
            for run in result.runs:
                started = time.monotonic()
                with Context(model, run.requested, n_ctx, n_threads) as context:
                    run.windows.append(_run_window(context, window, first, reference))
                    run.cache_bytes = context.cache_bytes
                run.seconds.append(time.monotonic() - started)
                advance(str(run.effective))
    except KeyboardInterrupt:
        if result.n_windows == 0:
            raise
    return result


def _ppl(nll: NDArray[np.float64]) -> float:
    return float(np.exp(nll.mean())) if len(nll) else float("nan")


def _summary(kld: NDArray[np.float64]) -> dict[str, float]:
    if not len(kld):
        return dict.fromkeys(("mean", "median", "p99", "p999", "max"), float("nan"))
    median, p99, p999 = (float(p) for p in np.percentile(kld, (50, 99, 99.9)))
    return {"mean": float(kld.mean()), "median": median, "p99": p99, "p999": p999, "max": float(kld.max())}


def records(measurement: Measurement) -> list[dict[str, Any]]:
    """One dict per cache, the objects of --json. Sizes in bytes, times in seconds, PPL and KLD in nats' terms;
    `non_finite` counts the scored tokens whose logits were NaN or infinite, which no other number includes."""
    n = measurement.n_windows
    reference_nll = np.concatenate(measurement.reference_nll[:n])
    out: list[dict[str, Any]] = []
    for run in measurement.runs:
        all_scores = join(run.windows[:n])
        finite = all_scores.finite
        record: dict[str, Any] = {
            "cache": str(run.effective),
            "requested": str(run.requested),
            "bits_k": bits_per_value(run.effective.k),
            "bits_v": bits_per_value(run.effective.v),
            "kv_bytes": run.cache_bytes,
            "ppl": _ppl(all_scores.nll[finite]),
            "ppl_f16": _ppl(reference_nll[finite & np.isfinite(reference_nll)]),
        }
        if measurement.with_kld:
            kld = all_scores.kld[finite]
            record["kld"] = {**_summary(kld), "ci95": list(bootstrap_ci95([w.kld[w.finite] for w in run.windows[:n]]))}
            record["same_top"] = float(all_scores.same_top[finite].mean()) if finite.any() else float("nan")
        record |= {
            "non_finite": int((~finite).sum()),
            "chunks": n,
            "ctx": measurement.n_ctx,
            "model": measurement.model,
            "upstream_commit": native.build_info()["upstream_commit"],
            "seconds": round(sum(run.seconds[:n]), 3),
        }
        out.append(record)
    return out
