#!/usr/bin/env python3
"""Writes a llama model of random weights in the shape of an 8B model, to time llama-bench without a download.

    scripts/make_model.py -o random-8b.gguf               # 4.5 GB, seconds
    scripts/make_model.py -o small.gguf --layers 2 --vocab 1024

Weights are Q4_0 blocks of plausible scale; the model writes noise at the speed of a real one. Needs numpy and gguf:
where that package is not installed, the one of a llama.cpp in build*/ is used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

try:
    import gguf
except ModuleNotFoundError:
    found = sorted(Path(__file__).resolve().parents[1].glob("build*/llama.cpp/gguf-py"))
    if not found:
        sys.exit(
            "make_model.py: needs the Python package gguf: pip install gguf, or a build of turbokv beside scripts/"
        )
    sys.path.insert(0, str(found[0]))
    import gguf

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an fp16 scale and 32 values of 4 bits
POOL_BYTES = 1 << 26
Q4_RMS = 4.61  # of the integers -8..7


def random_blocks(n_bytes: int, rms: float) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """At least n_bytes of Q4_0 blocks whose weights have about that RMS: a pool of random ones, repeated."""
    random = np.random.default_rng(0)
    n = min(n_bytes, POOL_BYTES) // BLOCK_BYTES + 1
    blocks = random.integers(0, 256, (n, BLOCK_BYTES), np.uint8)
    scales = (random.uniform(0.7, 1.3, n) * rms / Q4_RMS).astype("<f2")
    blocks[:, :2] = scales.view(np.uint8).reshape(n, 2)
    return np.resize(blocks, (n_bytes // BLOCK_BYTES + 1) * BLOCK_BYTES)


def tokenizer(n_vocab: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-pair encoding that knows every byte, one merge, and names for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = ["<|endoftext|>", *letters, "\u0120t"]
    return tokens + [f"<unused{i}>" for i in range(n_vocab - len(tokens))], ["\u0120 t"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    for name, default in (
        ("layers", 32), ("embd", 4096), ("heads", 32), ("kv-heads", 8), ("head-size", 128), ("ffn", 14336),
        ("vocab", 128256), ("context", 131072),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    given = parser.parse_args()
    if given.vocab < 258:
        parser.error("--vocab is 258 at least: the bytes, their end, and one merge")
    if given.embd % BLOCK or given.ffn % BLOCK or (given.heads * given.head_size) % BLOCK:
        parser.error(f"--embd, --ffn and --heads times --head-size are multiples of {BLOCK}")
    return given


def main() -> None:
    given = arguments()
    writer = gguf.GGUFWriter(given.output, "llama")
    writer.add_name(f"random weights, {given.layers} layers of {given.embd}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(given.context)
    writer.add_embedding_length(given.embd)
    writer.add_block_count(given.layers)
    writer.add_feed_forward_length(given.ffn)
    writer.add_head_count(given.heads)
    writer.add_head_count_kv(given.kv_heads)
    writer.add_key_length(given.head_size)
    writer.add_value_length(given.head_size)
    writer.add_rope_dimension_count(given.head_size)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(given.vocab)
    tokens, merges = tokenizer(given.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (given.vocab - 1)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    q_dim, kv_dim = given.heads * given.head_size, given.kv_heads * given.head_size
    shapes: list[tuple[str, tuple[int, ...]]] = [("token_embd", (given.vocab, given.embd))]
    for i in range(given.layers):
        shapes += [
            (f"blk.{i}.attn_norm", (given.embd,)),
            (f"blk.{i}.attn_q", (q_dim, given.embd)),
            (f"blk.{i}.attn_k", (kv_dim, given.embd)),
            (f"blk.{i}.attn_v", (kv_dim, given.embd)),
            (f"blk.{i}.attn_output", (given.embd, q_dim)),
            (f"blk.{i}.ffn_norm", (given.embd,)),
            (f"blk.{i}.ffn_gate", (given.ffn, given.embd)),
            (f"blk.{i}.ffn_up", (given.ffn, given.embd)),
            (f"blk.{i}.ffn_down", (given.embd, given.ffn)),
        ]
    shapes += [("output_norm", (given.embd,)), ("output", (given.vocab, given.embd))]

    def block_bytes(shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] // BLOCK * BLOCK_BYTES

    for name, shape in shapes:
        if len(shape) == 1:
            writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * shape[0])
        else:
            byte_shape = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(f"{name}.weight", byte_shape, np.dtype(np.uint8), block_bytes(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # Every tensor is another part of the same blocks.
    largest = max(block_bytes(shape) for _, shape in shapes if len(shape) == 2)
    blocks = random_blocks(largest + POOL_BYTES, given.embd**-0.5)
    random = np.random.default_rng(1)
    for _, shape in shapes:
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            start = int(random.integers(0, POOL_BYTES // BLOCK_BYTES)) * BLOCK_BYTES
            writer.write_tensor_data(blocks[start : start + block_bytes(shape)])
    writer.close()
    print(f"{given.output}: {given.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
