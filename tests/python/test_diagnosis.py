"""Models whose f16 cache gives no sense: the command says what is wrong with them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import gguf
import numpy as np
import pytest
from tiny_models import write_llama
from turbokv import cache_type, data, diagnosis, perplexity
from turbokv.engine import Model
from turbokv.errors import TurbokvError
from turbokv.perplexity import Passage

Tensors = dict[str, gguf.ReaderTensor]
Damage = Callable[[Tensors], None]


def damaged(folder: Path, damage: Damage) -> Path:
    """A copy of mini whose tensors, as they lie in the file, were changed by `damage`."""
    path = folder / "damaged.gguf"
    shutil.copyfile(data.MINI, path)
    reader = gguf.GGUFReader(path, "r+")
    damage({tensor.name: tensor for tensor in reader.tensors})
    cast(np.memmap, reader.data).flush()
    return path


def measure(path: Path, *, with_kld: bool = True, text: Passage | None = None) -> None:
    text = text or Passage("sample", data.read_text(None))
    with Model(path) as model:
        perplexity.measure(
            model, model.tokenize(text.content), cache_type.parse_pairs("q8_0"),
            n_ctx=128, n_windows=1, n_threads=2, with_kld=with_kld, text=text,
        )  # fmt: skip


def norm_with(value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors["blk.3.ffn_norm.weight"].data[17] = value

    return damage


def scale_with(value: float) -> Damage:
    """Of one block of a q8_0 tensor: 34 bytes, of which the first two are an f16."""

    def damage(tensors: Tensors) -> None:
        tensors["blk.5.ffn_up.weight"].data[9, 34:36] = np.float16(value).reshape(1).view(np.uint8)

    return damage


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (norm_with(math.nan), "blk.3.ffn_norm.weight"),
        (norm_with(math.inf), "blk.3.ffn_norm.weight"),
        (scale_with(math.nan), "blk.5.ffn_up.weight"),
        (scale_with(-math.inf), "blk.5.ffn_up.weight"),
    ],
    ids=["NaN in a norm", "inf in a norm", "NaN scale of a block", "inf scale of a block"],
)
def test_non_finite_weights_are_named(damage: Damage, name: str, tmp_path: Path) -> None:
    """Where it is in the feed-forward network the logits are finite: see engine.Model."""
    with pytest.raises(TurbokvError, match=f"damaged.gguf is damaged: tensor {name} holds NaN"):
        measure(damaged(tmp_path, damage))


def test_overflow_with_finite_weights_is_told_from_damage(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        for i in range(8):
            tensors[f"blk.{i}.attn_norm.weight"].data[:] = 3e38

    path = damaged(tmp_path, damage)
    for with_kld in (True, False):
        with pytest.raises(TurbokvError, match=r"gives NaN or infinite logits .* window 1. Its weights are finite"):
            measure(path, with_kld=with_kld)


def test_several_damaged_tensors_are_counted(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        for i in range(3):
            tensors[f"blk.{i}.ffn_norm.weight"].data[0] = math.nan

    with pytest.raises(TurbokvError, match=r"tensor blk.0.ffn_norm.weight and 2 more hold"):
        measure(damaged(tmp_path, damage))


def test_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    """Tokens that stand for the rows of others: what the tokenizer of another model does."""

    def damage(tensors: Tensors) -> None:
        order = np.random.default_rng(0).permutation(len(tensors["token_embd.weight"].data))
        for name in ("token_embd.weight", "output.weight"):
            if name in tensors:
                tensors[name].data[:] = tensors[name].data[order]

    path = damaged(tmp_path, damage)
    for with_kld in (True, False):
        with pytest.raises(TurbokvError, match=r"worse than chance .* tokenizer is not the one"):
            measure(path, with_kld=with_kld)


def test_untrained_model_is_measured(tmp_path: Path) -> None:
    """It knows nothing, but it is not wrong."""
    measure(write_llama(tmp_path / "random.gguf", 64))


def test_model_is_refused_on_text_only() -> None:
    """Random tokens are worse than chance for a trained model; who gives tokens knows what they are."""
    tokens = np.random.default_rng(0).integers(1, 16384, 128, dtype=np.int32)
    with Model(data.MINI) as model:
        perplexity.measure(
            model, tokens, cache_type.parse_pairs("q8_0"), n_ctx=128, n_windows=1, n_threads=2, with_kld=False
        )
        with pytest.raises(TurbokvError, match="worse than chance"):
            diagnosis.check_better_than_chance(model, math.log(model.n_vocab) + 1.1)
        diagnosis.check_better_than_chance(model, math.log(model.n_vocab) + 0.9)


# --- text that a tokenizer changes


@pytest.mark.parametrize("path", [data.MINI, data.BIAS], ids=["mini", "bias"])
def test_built_in_tokenizers_keep_every_text(path: Path) -> None:
    text = data.read_text(None)[:20000] + "  café 你好 \U0001f600\r\n\t ﬁ a , b"
    with Model(path) as model:
        tokens = model.tokenize(text)
        assert diagnosis.text_lost(model, tokens, text) is None
        assert diagnosis.text_lost(model, tokens[:100], text) is None  # a part that was measured


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (b"Some text.", None),
        (b" Some text.", None),  # as SentencePiece puts it
        (b"some text.", "'Some text.' becomes 'some text.'"),
        (b"Som", None),
        (b"Some text. And more", "'Some text.' becomes"),
        (b"So\xef\xbf\xbd", "'Some text.' becomes"),
    ],
)
def test_text_that_is_changed_is_shown(kept: bytes, lost: str | None) -> None:
    model = cast(Model, SimpleNamespace(path=Path("model.gguf"), detokenize=lambda tokens: kept))
    said = diagnosis.text_lost(model, np.zeros(3, np.int32), "Some text.")
    assert (said is None) == (lost is None)
    assert (lost or "") in (said or "")
