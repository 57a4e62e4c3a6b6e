"""Random models of about a megabyte whose output hangs on the KV cache, one for every kind of attention.

Random weights alone spread attention evenly over the context, and then hardly any damage to the cache is visible.
Here the queries are long, so that the scores of a query have a standard deviation of SHARPNESS and a few tokens get
most of the attention, and what attention returns outweighs the embedding of the token itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from tiny_models import N_FF, N_LAYER, N_VOCAB, TinyModel
from turbokv.spec import BY_NAME, FAMILIES

SHARPNESS = 3.5
ATTENTION_GAIN = 2.0
LOGIT_GAIN = 1.5

LATENT = 128  # values of an MLA cache that are K and V at once


def granularity(family: str) -> int:
    """What head sizes must be multiples of."""
    return 128 if BY_NAME[family].rotation == "codec" else 64


def families_for(head_dim: int) -> list[str]:
    """Our types for heads of this size."""
    return [family for family in FAMILIES if head_dim % granularity(family) == 0]


@dataclass(frozen=True)
class Peaked:
    """A decoder of two layers. If it has a window, layer 0 slides it, and layer 1 sees the whole context."""

    architecture: str
    head_dim: int
    n_head: int = 4
    n_head_kv: int = 2
    n_embd: int = 64
    n_rot: int | None = None  # values of a head that RoPE turns; None: all
    window: int | None = None
    head_dim_swa: int | None = None  # of layer 0; None: head_dim
    k_outlier: float = 0.0  # RMS of the bias of eight values in every K head; without bias they have RMS 1

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of the layers."""
        return (self.head_dim_swa or self.head_dim, self.head_dim)

    @property
    def common_head_dim(self) -> int:
        """What a block has to divide."""
        return gcd(*self.head_dims)

    @property
    def families(self) -> list[str]:
        """Our types that work here."""
        return [] if self.architecture == "deepseek2" else families_for(self.common_head_dim)

    @property
    def _gemma(self) -> bool:
        return self.architecture in ("gemma3", "gemma4")

    @property
    def _qk_norm(self) -> bool:
        return self._gemma or self.architecture == "qwen3"

    @property
    def _post_norm(self) -> bool:
        """Whether norms follow attention and the feed-forward network, too."""
        return self._gemma or self.architecture == "glm4"

    def write(self, path: Path) -> Path:
        """Writes the model, always the same, and returns its path."""
        model = TinyModel(
            path,
            self.architecture,
            head_dim=self.head_dim,
            head_dim_v=LATENT if self.architecture == "deepseek2" else None,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
            n_embd=self.n_embd,
        )
        self._write_header(model)
        embedding_gain = 1 if self._gemma else self.n_embd**0.5  # gemma multiplies by the root itself
        model.matrix("token_embd", N_VOCAB, self.n_embd, gain=embedding_gain)
        model.norm("output_norm", self.n_embd)
        model.matrix("output", N_VOCAB, self.n_embd, gain=LOGIT_GAIN)
        for i, head_dim in enumerate(self.head_dims):
            if self.architecture == "deepseek2":
                self._write_latent_attention(model, f"blk.{i}")
            else:
                self._write_attention(model, f"blk.{i}", head_dim)
            self._write_feed_forward(model, f"blk.{i}")
        return model.save()

    def _write_header(self, model: TinyModel) -> None:
        header = model.header
        header.add_rope_dimension_count(self.n_rot or self.head_dim)
        if self.window:
            header.add_sliding_window(self.window)
            header.add_sliding_window_pattern([True, False])
        if self.architecture == "gemma4":
            head_dim_swa, _ = self.head_dims
            header.add_key_length_swa(head_dim_swa)
            header.add_value_length_swa(head_dim_swa)
            header.add_rope_dimension_count_swa(head_dim_swa)
            header.add_embedding_length_per_layer_input(0)
            model.vector("rope_freqs", np.ones(self.head_dim // 2))
        if self.architecture == "deepseek2":
            header.add_q_lora_rank(0)
            header.add_kv_lora_rank(LATENT)
            header.add_key_length_mla(self.head_dim)
            header.add_value_length_mla(LATENT)
            header.add_leading_dense_block_count(N_LAYER)
            header.add_expert_feed_forward_length(0)
            header.add_expert_shared_count(0)

    def _write_attention(self, model: TinyModel, block: str, head_dim: int) -> None:
        model.norm(f"{block}.attn_norm", self.n_embd)
        model.matrix(f"{block}.attn_q", self.n_head * head_dim, self.n_embd, gain=1 if self._qk_norm else SHARPNESS)
        model.matrix(f"{block}.attn_k", self.n_head_kv * head_dim, self.n_embd)
        model.matrix(f"{block}.attn_v", self.n_head_kv * head_dim, self.n_embd)
        if self._qk_norm:
            unscaled = self.architecture == "gemma4"  # it does not divide the scores by the root of head_dim
            model.norm(f"{block}.attn_q_norm", head_dim, gain=SHARPNESS / head_dim**0.5 if unscaled else SHARPNESS)
            model.norm(f"{block}.attn_k_norm", head_dim)
        if self.k_outlier:
            # In the four pairs that RoPE turns slowest: they stay outliers over the whole context, and add the same
            # to all scores of a query.
            bias = np.zeros((self.n_head_kv, 2, head_dim // 2))
            bias[:, :, -4:] = self.k_outlier * model.normal(self.n_head_kv, 2, 4)
            model.bias(f"{block}.attn_k", bias.ravel())
        output_gain = 1 if self._post_norm else ATTENTION_GAIN
        model.matrix(f"{block}.attn_output", self.n_embd, self.n_head * head_dim, gain=output_gain)
        if self._post_norm:
            model.norm(f"{block}.post_attention_norm", self.n_embd, gain=ATTENTION_GAIN)

    def _write_latent_attention(self, model: TinyModel, block: str) -> None:
        """MLA: one vector of LATENT values and n_rot values with RoPE is cached for all heads. Every head reads
        LATENT values of K and of V out of it."""
        n_rot = self.head_dim - LATENT
        model.norm(f"{block}.attn_norm", self.n_embd)
        model.matrix(f"{block}.attn_q", self.n_head * self.head_dim, self.n_embd, gain=SHARPNESS)
        model.matrix(f"{block}.attn_kv_a_mqa", LATENT + n_rot, self.n_embd)
        model.norm(f"{block}.attn_kv_a_norm", LATENT)
        model.matrix(f"{block}.attn_k_b", self.n_head, LATENT, LATENT)
        model.matrix(f"{block}.attn_v_b", self.n_head, LATENT, LATENT)
        model.matrix(f"{block}.attn_output", self.n_embd, self.n_head * LATENT, gain=ATTENTION_GAIN)

    def _write_feed_forward(self, model: TinyModel, block: str) -> None:
        model.norm(f"{block}.ffn_norm", self.n_embd)
        if self.architecture == "glm4":
            model.matrix(f"{block}.ffn_up", 2 * N_FF, self.n_embd)  # its first half is the gate
        else:
            model.matrix(f"{block}.ffn_gate", N_FF, self.n_embd)
            model.matrix(f"{block}.ffn_up", N_FF, self.n_embd)
        model.matrix(f"{block}.ffn_down", self.n_embd, N_FF)
        if self._post_norm:
            model.norm(f"{block}.post_ffw_norm", self.n_embd)


MODELS = {
    "heads of 64": Peaked("llama", 64, n_head=8),
    "heads of 128": Peaked("llama", 128),
    "heads of 192": Peaked("llama", 192),
    "heads of 256": Peaked("llama", 256, n_head=2, n_head_kv=1),
    "K bias": Peaked("qwen2", 64, n_embd=256, k_outlier=6),
    "QK norm": Peaked("qwen3", 128),
    "partial RoPE": Peaked("glm4", 128, n_rot=64),
    "sliding window": Peaked("gemma3", 128, window=64),
    "two head sizes": Peaked("gemma4", 128, window=64, head_dim_swa=64),
    # what llama.cpp does not rotate
    "heads of 96": Peaked("llama", 96),
    "two head sizes, one of 96": Peaked("gemma4", 192, window=64, head_dim_swa=96),
    "latent vector": Peaked("deepseek2", 192, n_head_kv=1, n_rot=64),
}
