"""What is wrong with a model whose f16 cache gives no sense: its values overflow, or its tokenizer is the wrong one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from turbokv.engine import Model
from turbokv.errors import TurbokvError

WORSE_THAN_CHANCE = 1.0  # nats. Untrained models are up to 0.5 above chance, mini with shuffled tokens 1.8


def non_finite(model: Model, window: int, position: int) -> TurbokvError:
    """For a NaN or infinite logit of the f16 cache, at a position of a window, both from 0. Model has checked that the
    weights are finite."""
    return TurbokvError(
        f"{model.path.name} gives NaN or infinite logits with an f16 cache, first at token {position} of window "
        f"{window + 1}. Its weights are finite, so values inside of it get too large: it is damaged, or its "
        "activations leave the range of f16 (65504). Nothing can be measured against such a reference"
    )


def check_better_than_chance(model: Model, mean_nll: float) -> None:
    """Raises TurbokvError if a model is surer of wrong tokens than one that takes all for equally likely."""
    chance = math.log(model.n_vocab)
    if mean_nll > chance + WORSE_THAN_CHANCE:
        raise TurbokvError(
            f"{model.path.name} predicts this text worse than chance with an f16 cache: NLL {mean_nll:.2f} nats per "
            f"token, where {model.n_vocab} equally likely tokens have {chance:.2f}. Its tokenizer is not the one that "
            "it was trained with, or its weights are damaged: convert it again"
        )


def text_lost(model: Model, tokens: NDArray[np.int32], text: str) -> str | None:
    """What the tokenizer makes of a text that its tokens, without BOS, do not give back; None if they do.

    Tokenizers that normalize a text (Unicode forms, upper case, several spaces) lose something rightly; one that lacks
    half of the characters is the wrong one.
    """
    original, kept = text.encode(), model.detokenize(tokens)
    if not original.startswith(b" "):
        kept = kept.removeprefix(b" ")  # some tokenizers put it there
    if original.startswith(kept):
        return None
    shorter = min(len(original), len(kept))
    differs = np.frombuffer(original, np.uint8, shorter) != np.frombuffer(kept, np.uint8, shorter)
    at = int(differs.argmax()) if differs.any() else shorter
    show = slice(max(0, at - 10), at + 20)
    return (
        f"the tokenizer of {model.path.name} does not keep the text: {original[show].decode(errors='replace')!r} "
        f"becomes {kept[show].decode(errors='replace')!r}. If that is no normal form of it, the tokenizer is wrong"
    )
