"""Random models of a few hundred kilobytes, for head sizes that the built-in models do not have."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from turbokv import data

N_VOCAB = 512
N_EMBD = 64
N_FF = 64
N_LAYER = 2
N_BYTE_TOKENS = 257  # mini's tokens: <|endoftext|>, 256 bytes, then one token per merge, in order


@cache
def _tokenizer() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, and merges: the start of mini's byte-pair encoding, which is one itself."""
    fields = gguf.GGUFReader(data.MINI).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    return tokens[:N_VOCAB], types[:N_VOCAB], merges[: N_VOCAB - N_BYTE_TOKENS]


class TinyModel:
    """Writes one model: the sizes and the tokenizer at once, tensors as they are added, the file at save().

    The random numbers are the same in every run. `header` is the gguf writer, for what one architecture wants more.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        *,
        head_dim: int,
        n_head: int,
        n_head_kv: int,
        head_dim_v: int | None = None,  # None: head_dim
        n_embd: int = N_EMBD,
    ) -> None:
        self.path, self.n_embd = path, n_embd
        self._random = np.random.default_rng(0)
        self.header = header = gguf.GGUFWriter(path, architecture)
        header.add_context_length(2048)
        header.add_embedding_length(n_embd)
        header.add_block_count(N_LAYER)
        header.add_feed_forward_length(N_FF)
        header.add_head_count(n_head)
        header.add_head_count_kv(n_head_kv)
        header.add_key_length(head_dim)
        header.add_value_length(head_dim_v or head_dim)
        header.add_layer_norm_rms_eps(1e-6)

        tokens, types, merges = _tokenizer()
        header.add_tokenizer_model("gpt2")
        header.add_tokenizer_pre("gpt-2")
        header.add_token_list(tokens)
        header.add_token_types(types)
        header.add_token_merges(merges)
        header.add_bos_token_id(0)
        header.add_eos_token_id(0)
        header.add_add_bos_token(True)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        return self._random.standard_normal(shape)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Adds `<name>.weight`, shape [..., outputs, inputs]: inputs of RMS 1 give outputs of RMS `gain`."""
        weights = gain * self.normal(*shape) / np.sqrt(shape[-1])
        self.header.add_tensor(f"{name}.weight", weights.astype(np.float16))

    def vector(self, name: str, values: NDArray[np.float64]) -> None:
        self.header.add_tensor(f"{name}.weight", values.astype(np.float32))

    def norm(self, name: str, n: int, gain: float = 1.0) -> None:
        """Adds `<name>.weight` [n], the weights of an RMS norm whose outputs have RMS `gain`."""
        self.header.add_tensor(f"{name}.weight", np.full(n, gain, np.float32))

    def bias(self, name: str, values: NDArray[np.float64]) -> None:
        self.header.add_tensor(f"{name}.bias", values.astype(np.float32))

    def save(self) -> Path:
        self.header.write_header_to_file()
        self.header.write_kv_data_to_file()
        self.header.write_tensors_to_file()
        self.header.close()
        return self.path


def write_llama(path: Path, head_dim: int, n_head: int = 4, n_head_kv: int = 2) -> Path:
    """Writes a llama model with the given head size, and returns its path. Its attention is flat, as random weights
    make it: enough to see that a type works at all. For quality see peaked_models.py."""
    model = TinyModel(path, "llama", head_dim=head_dim, n_head=n_head, n_head_kv=n_head_kv)
    model.header.add_rope_dimension_count(head_dim)
    model.matrix("token_embd", N_VOCAB, N_EMBD)  # also the output matrix
    model.norm("output_norm", N_EMBD)
    for i in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            model.norm(f"blk.{i}.{norm}", N_EMBD)
        model.matrix(f"blk.{i}.attn_q", n_head * head_dim, N_EMBD)
        model.matrix(f"blk.{i}.attn_k", n_head_kv * head_dim, N_EMBD)
        model.matrix(f"blk.{i}.attn_v", n_head_kv * head_dim, N_EMBD)
        model.matrix(f"blk.{i}.attn_output", N_EMBD, n_head * head_dim)
        model.matrix(f"blk.{i}.ffn_gate", N_FF, N_EMBD)
        model.matrix(f"blk.{i}.ffn_up", N_FF, N_EMBD)
        model.matrix(f"blk.{i}.ffn_down", N_EMBD, N_FF)
    return model.save()
