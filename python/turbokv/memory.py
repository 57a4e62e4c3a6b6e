"""Bytes that a model and its cache need, as llama.cpp itself computes them without allocating or reading weights.

A model is loaded with llama.cpp's `no_alloc`, as its own tools do before they fit a model to a GPU: from the GGUF
header alone, with tensors that have a size and no memory. Contexts on it are built like real ones, so that the
padding of the context, heads per layer, sliding windows, layers without attention, recurrent states and the types
of our heads' sizes are llama.cpp's own answers for every architecture, and no formula is repeated here.

The numbers are sums over the machine: what lies on GPUs and what in main memory.

What comes on top and is in no number: the program and its vocabulary, the work memory of the threads and, per slot of
a server, its sampler.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from turbokv import device, native
from turbokv.cache_type import CachePair, type_ids
from turbokv.closing import Closing
from turbokv.engine import MAX_BATCH, MAX_UBATCH, Model, log
from turbokv.errors import CacheRefused, TurbokvError

COMPUTE_BUFFER = re.compile(r"compute buffer size = +([\d.]+) MiB")
STEP = 256  # llama.cpp pads the context to this many tokens


@dataclass(frozen=True)
class Usage:
    """Bytes of a context: kv is the cache (recurrent states included), exact; compute the buffers of its largest graph,
    which llama.cpp tells to 0.01 MiB."""

    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.kv + self.compute


class Sizes(Closing):
    """A model without its weights, which tells what it would need. Use as a context manager.

    Sizes are those of llama-server with the same context and number of slots: batches of 2048 tokens in parts of 512,
    logits of one token per slot, Flash Attention where the backend has it, and a window's worth of cache in layers
    with a sliding window. The layers are where `placement` says, left out on a GPU if there is one. Raises TurbokvError
    if the model cannot be loaded.
    """

    def __init__(self, path: Path, placement: device.Placement | None = None) -> None:
        self.model = Model(path, no_alloc=True, placement=placement)
        self._lib = native.llama()
        handle = self.model.handle
        self.weights: int = self._lib.llama_model_size(handle)  # bytes of all tensors, over all parts of a split file
        self.parameters: int = self._lib.llama_model_n_params(handle)
        self.architecture = self._meta("general.architecture")

    def _meta(self, key: str) -> str:
        value = ctypes.create_string_buffer(256)
        self._lib.llama_model_meta_val_str(self.model.handle, key.encode(), value, len(value))
        return value.value.decode(errors="replace")

    def usage(self, pair: CachePair, n_ctx: int, n_seq: int = 1) -> Usage:
        """Of a context of n_ctx tokens, divided among n_seq sequences (slots of a server). Raises TurbokvError if the
        model does not take this cache."""
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_outputs_max = n_ctx, n_seq, n_seq
        params.n_outputs_max_per_seq = 1
        params.n_batch, params.n_ubatch = MAX_BATCH, MAX_UBATCH
        params.swa_full = False
        params.type_k, params.type_v = type_ids()[pair.k], type_ids()[pair.v]
        log.clear()
        handle = self._lib.llama_init_from_model(self.model.handle, params)
        if not handle:
            reason = log.errors()
            error = CacheRefused if "turbokv: " in reason else TurbokvError
            raise error(f"no context with cache {pair} for {self.model.path.name}: {reason}")
        try:
            mib = [float(found[1]) for _, line in log.lines if (found := COMPUTE_BUFFER.search(line))]
            return Usage(self._lib._lib.turbokv_cache_bytes(handle), round(sum(mib) * 2**20))
        finally:
            self._lib.llama_free(handle)

    def longest(self, pair: CachePair, memory: int, most: int, n_seq: int = 1) -> int:
        """The most tokens per sequence, a multiple of 256 up to `most` (itself, if all of it fits), with which weights
        and context stay within `memory` bytes; 0 if not even 256 do. The bytes grow with the tokens but for a few
        MiB, and what is returned was seen to fit."""

        def fits(n_ctx: int) -> bool:
            return self.weights + self.usage(pair, n_ctx * n_seq, n_seq).total <= memory

        if fits(most):
            return most
        low, high = 0, -(-most // STEP)  # in steps: low fits or is 0, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * STEP) else (low, middle)
        return low * STEP

    def close(self) -> None:
        self.model.close()
