"""Random llama models of a few hundred kilobytes, for head sizes that the built-in models do not have."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
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


def write_llama(path: Path, head_dim: int, n_head: int = 4, n_head_kv: int = 2) -> Path:
    """Writes a model with fixed random weights and the given head size, and returns its path."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)

    tokens, types, merges = _tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)

    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float16))

    matrix("token_embd.weight", N_VOCAB, N_EMBD)  # also the output matrix
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for i in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(N_EMBD, np.float32))
        matrix(f"blk.{i}.attn_q.weight", n_head * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_k.weight", n_head_kv * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_v.weight", n_head_kv * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_output.weight", N_EMBD, n_head * head_dim)
        matrix(f"blk.{i}.ffn_gate.weight", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_up.weight", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_down.weight", N_EMBD, N_FF)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
