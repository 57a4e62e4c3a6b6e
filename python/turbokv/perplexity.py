"""Perplexity of a cache type, and its KL divergence from the f16 cache, over windows of a text.

The protocol is llama-perplexity's, so that the numbers can be held against it: the text is cut into windows of
n_ctx tokens, the first token of each is replaced by BOS if the model has one, and positions n_ctx/2 .. n_ctx-2
are scored. Window by window the f16 reference is computed first, or taken from a reference.Store, then every cache
runs on the same window in the same batches. An `f16` among the caches is a second run, which diverges by exactly 0.

The noise floor is f16 in physical batches of NOISE_UBATCH tokens. It has to be below 64: from there on, llama.cpp's
f16 attention on CPUs goes through one and the same tiled kernel, and 64, 128 and 512 give the same bits. With 32 it
measures 0.00027 nats on mini and 0.00033 on bias, which is also what decoding token by token differs by. The noise
floor of decoding is therefore f16 in batches of 512.

Encoding the reference in 16 bits changes a KLD, against exact float64, at -c 1024 --chunks 4, in nats, by:

    model  cache   mean KLD   change   worst token
    mini   q8_0    0.000357   -3e-9    4e-6
    mini   turbo3  0.029318   +1e-7    4e-5
    bias   q8_0    0.000412   +5e-9    7e-6
    bias   turbo3  0.045896   -2e-7    6e-5
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from turbokv import diagnosis, native
from turbokv.cache_type import F16, CachePair, bits_per_value
from turbokv.device import ON_CPU, Placement
from turbokv.engine import MAX_UBATCH, Context, Model
from turbokv.errors import TurbokvError
from turbokv.fingerprint import text_fingerprint
from turbokv.reference import ROWS, Reference, Store, encode, log_probabilities
from turbokv.stats import bootstrap_ci95, trimmed_mean

if TYPE_CHECKING:  # pydantic takes a while to import, and `turbokv --help` does not need it
    from turbokv import record

NOISE_UBATCH = 32
LAST = 64  # positions of every window that are summed up separately, too

PathName = Literal["prefill", "decode"]


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


@dataclass(frozen=True)
class Passage:
    """A text that is measured, and its name."""

    name: str
    content: str


@dataclass
class Measurement:
    """A whole run: the reference's per-window NLL, its noise, and one CacheRun per cache."""

    model: str
    n_ctx: int
    with_kld: bool
    runs: list[CacheRun]
    reference_nll: list[NDArray[np.float64]] = field(default_factory=list)
    noise: list[Scores] = field(default_factory=list)  # of f16 in other batches; empty if it was not asked for
    path: PathName = "prefill"
    text: Passage = Passage("", "")
    placement: Placement = ON_CPU

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


def score(
    logits: NDArray[np.float32], reference: Reference | NDArray[np.float32] | None, targets: NDArray[np.int32]
) -> Scores:
    """Scores logits [n, n_vocab] against the reference for the same positions, encoded or as logits of the same shape
    (then exactly); targets [n] are the true next tokens.

    NLL in nats; KLD = sum p_ref * (log p_ref - log p), in nats. Rows with a NaN or infinite logit score NaN.
    Without a reference the logits are their own: zero divergence, the same top token.
    """
    parts = []
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(targets), ROWS):
            own, rows = logits[i : i + ROWS], slice(i, i + ROWS)
            own_log_p, nll = log_probabilities(own, targets[rows])
            if reference is None:
                parts.append(Scores(nll, np.zeros(len(own)), np.ones(len(own), bool)))
                continue
            if isinstance(reference, Reference):
                ref_log_p, ref_top = reference[rows].log_p(), reference.top[rows]
            else:
                ref_log_p, ref_top = log_probabilities(reference[rows], targets[rows])[0], reference[rows].argmax(-1)
            kld = (np.exp(ref_log_p) * (ref_log_p - own_log_p)).sum(axis=-1)
            if isinstance(reference, Reference):
                kld[reference[rows].equals(own, nll)] = 0
            parts.append(Scores(nll, kld, own.argmax(axis=-1) == ref_top))
    return join(parts)


def _run_window(context: Context, tokens: NDArray[np.int32], first: int, reference: Reference | None) -> Scores:
    targets = tokens[first + 1 :]
    parts, row = [], 0
    for logits in _in_rows(context.logits(tokens, first)):
        n = min(len(logits), len(targets) - row)  # nothing follows the last position
        if n > 0:
            compare = None if reference is None else reference[row : row + n]
            parts.append(score(logits[:n], compare, targets[row : row + n]))
        row += n
    return join(parts)


def _in_rows(batches: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The same rows; single ones, as decoding gives them, in groups: numpy needs as long for one as for several."""
    waiting: list[NDArray[np.float32]] = []
    for batch in batches:
        if len(batch) > 1:
            yield batch
            continue
        waiting.append(batch.copy())
        if len(waiting) == ROWS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def join(parts: list[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.kld for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )


@dataclass(frozen=True)
class _F16:
    """The passes of f16 over the windows, computed or taken from the store."""

    model: Model
    n_ctx: int
    n_threads: int
    path: PathName
    text: Passage | None
    store: Store | None

    def nll(self, i: int, window: NDArray[np.int32]) -> NDArray[np.float64]:
        with self._context() as context:
            return self._checked(_run_window(context, window, self.n_ctx // 2, None).nll, i)

    def reference(self, i: int, window: NDArray[np.int32]) -> Reference:
        name, first = f"window-{i:05}", self.n_ctx // 2
        if self.store and (known := self.store.load(name, window, Reference.__dataclass_fields__)):
            return Reference(**known)  # type: ignore[arg-type]
        with self._context() as context:
            reference = encode(_in_rows(context.logits(window, first)), window[first + 1 :], self.model.n_vocab)
        self._checked(reference.nll, i)
        if self.store:
            self.store.save(name, window, vars(reference))
        return reference

    def noise(self, i: int, window: NDArray[np.int32], reference: Reference) -> Scores:
        name = f"noise-{i:05}"
        if self.store and (known := self.store.load(name, window, Scores.__dataclass_fields__)):
            return Scores(**known)  # type: ignore[arg-type]
        n_ubatch = _noise_ubatch(self.n_ctx, self.path)
        with Context(self.model, F16, self.n_ctx, self.n_threads, n_ubatch=n_ubatch) as context:
            scores = _run_window(context, window, self.n_ctx // 2, reference)
        if self.store:
            self.store.save(name, window, vars(scores))
        return scores

    def _context(self) -> Context:
        return Context(self.model, F16, self.n_ctx, self.n_threads, n_batch=_n_batch(self.path))

    def _checked(self, nll: NDArray[np.float64], i: int) -> NDArray[np.float64]:
        """The same values; raises TurbokvError if they show that nothing can be measured with this model."""
        finite = np.isfinite(nll)
        if not finite.all():
            raise diagnosis.non_finite(self.model, i, self.n_ctx // 2 + int(finite.argmin()))
        if self.text and i == 0:
            diagnosis.check_better_than_chance(self.model, float(nll.mean()))
        return nll


def measure(
    model: Model,
    tokens: NDArray[np.int32],
    pairs: list[CachePair],
    *,
    n_ctx: int,
    n_windows: int,
    n_threads: int,
    with_kld: bool,
    path: PathName = "prefill",
    noise_floor: bool = False,
    text: Passage | None = None,
    store: Store | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Runs every cache over the windows; `advance` is called with the name of the pass that just ended.

    path: `decode` runs the caches and the reference token by token. noise_floor: run f16 once more in batches of
    another size. text: what the tokens come from; a model that predicts it worse than chance is refused. Without it
    the tokens may be anything. store: where finished windows of f16 are kept and looked for, None is nowhere. Without
    with_kld there is neither noise floor nor store.

    On KeyboardInterrupt the windows that all caches have finished are returned; before the first it is raised. Raises
    CacheRefused for a cache that the model does not take, TurbokvError if f16 gives no finite logits.
    """
    runs = [CacheRun(pair, model.effective(pair)) for pair in pairs]
    result = Measurement(
        model.path.name, n_ctx, with_kld, runs, path=path, text=text or Passage("", ""), placement=model.placement
    )
    n_batch = _n_batch(path)
    f16 = _F16(model, n_ctx, n_threads, path, text, store)
    for pair in pairs:  # what cannot work is refused now, not after the windows before it
        Context(model, pair, min(n_ctx, 256), n_threads, n_batch=n_batch).close()
    try:
        for i, window in enumerate(windows(model, tokens, n_ctx, n_windows)):
            reference = f16.reference(i, window) if with_kld else None
            result.reference_nll.append(reference.nll if reference else f16.nll(i, window))
            advance("f16 reference")
            if reference and noise_floor:
                result.noise.append(f16.noise(i, window, reference))
                advance("noise floor")
            for run in result.runs:
                started = time.monotonic()
                with Context(model, run.requested, n_ctx, n_threads, n_batch=n_batch) as context:
                    run.windows.append(_run_window(context, window, n_ctx // 2, reference))
                    run.cache_bytes = context.cache_bytes
                run.seconds.append(time.monotonic() - started)
                advance(str(run.effective))
    except KeyboardInterrupt:
        if result.n_windows == 0:
            raise
    return result


def _n_batch(path: PathName) -> int | None:
    """Of a Context."""
    return 1 if path == "decode" else None


def _noise_ubatch(n_ctx: int, path: PathName) -> int:
    """Tokens per physical batch: on the other side of 64 than the reference's."""
    return min(NOISE_UBATCH, n_ctx // 4) if path == "prefill" else min(MAX_UBATCH, n_ctx)


# --- records


def records(measurement: Measurement) -> list[record.KldResult]:
    """One record per cache, the objects of --json. `non_finite` counts the scored tokens whose logits were NaN or
    infinite, which no other number includes."""
    from turbokv import record

    n = measurement.n_windows
    text = record.Text(name=measurement.text.name, sha256=text_fingerprint(measurement.text.content))
    noise_floor = _noise_floor(measurement)
    out = []
    for run in measurement.runs:
        scores, f16 = run.windows[:n], measurement.reference_nll[:n]
        finite = [window.finite for window in scores]
        nll = [window.nll[mask] for window, mask in zip(scores, finite, strict=True)]
        nll_f16 = [window[mask] for window, mask in zip(f16, finite, strict=True)]
        delta = [own - other for own, other in zip(nll, nll_f16, strict=True)]
        kld = [window.kld[mask] for window, mask in zip(scores, finite, strict=True)]
        last = [window.kld[-LAST:][mask[-LAST:]] for window, mask in zip(scores, finite, strict=True)]
        same_top = np.concatenate([window.same_top[mask] for window, mask in zip(scores, finite, strict=True)])
        with_kld = measurement.with_kld
        out.append(
            record.KldResult(
                kind="kld" if with_kld else "ppl",
                cache=str(run.effective),
                requested=str(run.requested),
                bits_k=bits_per_value(run.effective.k),
                bits_v=bits_per_value(run.effective.v),
                kv_bytes=run.cache_bytes,
                device=measurement.placement.device,
                gpu_layers=measurement.placement.gpu_layers,
                ppl=_ppl(np.concatenate(nll)),
                ppl_f16=_ppl(np.concatenate(nll_f16)),
                delta_nll=record.Estimate(mean=_mean(np.concatenate(delta)), ci95=_interval(delta)),
                kld=_divergence(kld) if with_kld else None,
                same_top=_mean(same_top) if with_kld else None,
                last64=_divergence(last) if with_kld else None,
                noise_floor=noise_floor,
                non_finite=sum(int((~mask).sum()) for mask in finite),
                ctx=measurement.n_ctx,
                chunks=n,
                path=measurement.path,
                text=text,
                model=measurement.model,
                upstream_commit=native.build_info()["upstream_commit"],
                seconds=round(sum(run.seconds[:n]), 3),
            )
        )
    return out


def _noise_floor(measurement: Measurement) -> record.NoiseFloor | None:
    from turbokv import record

    if not measurement.noise:
        return None
    scores = join(measurement.noise[: measurement.n_windows])
    finite = scores.finite
    return record.NoiseFloor(
        n_ubatch=_noise_ubatch(measurement.n_ctx, measurement.path),
        mean_kld=_mean(scores.kld[finite]),
        same_top=_mean(scores.same_top[finite]),
    )


def _divergence(windows: list[NDArray[np.float64]]) -> record.Divergence:
    from turbokv import record

    kld = np.concatenate(windows)
    if not len(kld):
        return record.Divergence(mean=None, ci95=None, median=None, trimmed_mean=None, p99=None, p999=None, max=None)
    median, p99, p999 = (float(p) for p in np.percentile(kld, (50, 99, 99.9)))
    return record.Divergence(
        mean=_mean(kld),
        ci95=_interval(windows),
        median=median,
        trimmed_mean=trimmed_mean(kld),
        p99=p99,
        p999=p999,
        max=float(kld.max()),
    )


def _ppl(nll: NDArray[np.float64]) -> float | None:
    return float(np.exp(nll.mean())) if len(nll) else None


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _interval(windows: list[NDArray[np.float64]]) -> tuple[float, float] | None:
    low, high = bootstrap_ci95(windows)
    return None if math.isnan(low) else (low, high)
