"""Whether decoding token by token gives the logits that one batch gives, with the same cache type and tokens.

Generation runs other code than a prompt does: one row of Q per pass, and often a kernel of its own for it. Perplexity
and KL divergence feed whole windows and never run that code.

How much may differ: next to nothing. The bounds hold where the kernels add up in the same order whatever the batch
size, as llama.cpp's quantized attention on CPUs does: it differs by exactly 0. (Its f16 attention does not: large
batches go through a tiled kernel, which makes 0.0003 nats on the built-in models.) With another order, one unit in
the last place is enough to exceed them: it moves a few values of the next layer's K and V across a quantization
threshold, their error moves more, and the caches of the two ways drift apart until a good part of the type's whole
quantization noise stands in the logits, 0.003 to 0.005 nats for turbo3. Scores that are wrong by 1 % look the same.
`measure_steps` tells the two apart: it decodes every token on the cache that the batch wrote, so that nothing drifts.
There the unit in the last place makes 0.00001 nats, and the 1 % makes 0.0004.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbokv import data, perplexity
from turbokv.cache_type import CachePair
from turbokv.engine import Context, Model

WINDOW = 512  # tokens
FIRST = 64  # first scored position: with fewer tokens before it, attention has little to get wrong
MAX_KLD = 1e-4  # mean, in nats
MIN_SAME_TOP = 0.995


@dataclass(frozen=True)
class Agreement:
    """How well two ways agree: mean KLD in nats, NaN if a logit is not finite; share of n_scored with the same top."""

    mean_kld: float
    same_top: float
    n_scored: int

    @property
    def ok(self) -> bool:
        return self.mean_kld < MAX_KLD and self.same_top > MIN_SAME_TOP


def sample_window(model: Model) -> NDArray[np.int32]:
    """The first WINDOW tokens of the built-in text."""
    window: NDArray[np.int32] = perplexity.windows(model, model.tokenize(data.read_text(None)), WINDOW, 1)[0]
    return window


def measure(model: Model, pair: CachePair, tokens: NDArray[np.int32], n_threads: int) -> Agreement:
    """One token per pass, each way filling its own cache, against all tokens [n] in one pass; n > FIRST + 1.

    Raises TurbokvError if the model does not take this cache.
    """
    with Context(model, pair, len(tokens), n_threads, n_batch=len(tokens)) as context:
        batched = _collect(context.logits(tokens, FIRST))
    with Context(model, pair, len(tokens), n_threads, n_batch=1) as context:
        decoded = _collect(context.logits(tokens, FIRST))
    return _compare(decoded, batched, tokens)


def measure_steps(model: Model, pair: CachePair, tokens: NDArray[np.int32], n_threads: int) -> Agreement:
    """As measure(), but every token is decoded on the cache that the one pass over all tokens has written."""
    with Context(model, pair, len(tokens), n_threads, n_batch=len(tokens)) as context:
        batched = _collect(context.logits(tokens, FIRST))
        backwards = range(len(tokens) - 1, FIRST - 1, -1)  # a step overwrites its own token, and drops what follows
        decoded = _collect(context.repeat(tokens, position) for position in backwards)[::-1]
    return _compare(decoded, batched, tokens)


def _collect(parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([part.copy() for part in parts])


def _compare(decoded: NDArray[np.float32], batched: NDArray[np.float32], tokens: NDArray[np.int32]) -> Agreement:
    """Logits [n - FIRST, n_vocab] of both ways; the last row is left out, because no token follows it."""
    scores = perplexity.score(decoded[:-1], batched[:-1], tokens[FIRST + 1 :])
    return Agreement(float(scores.kld.mean()), float(scores.same_top.mean()), len(scores.kld))
