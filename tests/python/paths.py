"""Teacher-forced logits along the ways in which tokens reach the KV cache and attention reads it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from turbokv import native, perplexity
from turbokv.cache_type import CachePair, type_ids
from turbokv.closing import Closing
from turbokv.engine import Model, log
from turbokv.errors import TurbokvError


class Sequences(Closing):
    """A context of `n_seq` sequences of up to n_ctx tokens each. `parameters` are fields of llama_context_params."""

    def __init__(self, model: Model, pair: CachePair, n_ctx: int, n_seq: int = 1, **parameters: Any) -> None:
        self._lib = native.llama()
        self.n_seq, self.n_vocab = n_seq, model.n_vocab
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx * n_seq
        params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = False
        params.type_k, params.type_v = type_ids()[pair.k], type_ids()[pair.v]
        for name, value in parameters.items():
            setattr(params, name, value)
        log.clear()
        self.handle = self._lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise TurbokvError(f"no context with cache {pair} for {model.path.name}: {log.errors()}")
        self._memory = self._lib.llama_get_memory(self.handle)

    def decode(self, tokens: NDArray[np.int32], first: int, n_outputs: int) -> NDArray[np.float32]:
        """Decodes tokens [n_seq, n] at positions first.. of all sequences, interleaved, in one batch.
        Returns the logits [n_seq, n_outputs, n_vocab] of the last positions. Raises TurbokvError."""
        n = tokens.shape[1]
        batch = self._lib.llama_batch_init(tokens.size, 0, 1)
        try:
            for i, (position, sequence) in enumerate(np.ndindex(n, self.n_seq)):
                batch.token[i], batch.pos[i] = int(tokens[sequence, position]), first + position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = position >= n - n_outputs
            batch.n_tokens = tokens.size
            status = self._lib.llama_decode(self.handle, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise TurbokvError(f"llama_decode failed with status {status}: {log.errors()}")
        if n_outputs == 0:
            return np.empty((self.n_seq, 0, self.n_vocab), np.float32)
        rows = np.ctypeslib.as_array(self._lib.llama_get_logits(self.handle), (n_outputs, self.n_seq, self.n_vocab))
        return rows.transpose(1, 0, 2).copy()

    def drop(self, first: int, n: int) -> None:
        """Removes n tokens of every sequence and moves what follows down to `first`: a K-shift in the next decode."""
        for sequence in range(self.n_seq):
            if not self._lib.llama_memory_seq_rm(self._memory, sequence, first, first + n):
                raise TurbokvError(f"tokens {first} to {first + n} cannot be removed")
            self._lib.llama_memory_seq_add(self._memory, sequence, first + n, -1, -n)

    def states(self) -> list[ctypes.Array[ctypes.c_uint8]]:
        """What is cached of every sequence, as bytes."""
        states = []
        for sequence in range(self.n_seq):
            size = self._lib.llama_state_seq_get_size(self.handle, sequence)
            states.append((ctypes.c_uint8 * size)())
            if self._lib.llama_state_seq_get_data(self.handle, states[-1], size, sequence) != size:
                raise TurbokvError(f"the state of sequence {sequence} cannot be read")
        return states

    def restore(self, states: list[ctypes.Array[ctypes.c_uint8]]) -> None:
        """Replaces the sequences by those of another context, which has the same types."""
        for sequence, state in enumerate(states):
            if self._lib.llama_state_seq_set_data(self.handle, state, len(state), sequence) != len(state):
                raise TurbokvError(f"the state of sequence {sequence} cannot be restored: {log.errors()}")

    def close(self) -> None:
        if self.handle:
            self._lib.llama_free(self.handle)
            self.handle = None


@dataclass(frozen=True)
class TokenPath:
    """A prompt of n_prompt tokens goes into the cache; then `drop` of them behind BOS are removed and the others move
    up; then the remaining tokens follow, `batch` of every sequence at a time. Without `batch` all go at once."""

    n_prompt: int
    batch: int | None
    n_ubatch: int  # tokens of all sequences that one graph computes
    drop: int = 0
    n_seq: int = 1
    unified: bool = False  # one cache for all sequences, instead of one for each

    def logits(
        self, model: Model, pair: CachePair, tokens: NDArray[np.int32], *, unrotated: bool = False
    ) -> NDArray[np.float32]:
        """Logits [n_seq, n - n_prompt, n_vocab] at what follows the prompt in tokens [n_seq, n].

        `unrotated`: the prompt is cached without rotation and read as if it had one, as a lost rotation would have
        it: queries are rotated and the keys that they meet are not, and values are rotated on the way out only.
        """
        prompt, rest = tokens[:, : self.n_prompt], tokens[:, self.n_prompt :]
        with self._context(model, pair, tokens) as context:
            if self.batch is None:
                return context.decode(tokens, 0, rest.shape[1])
            if unrotated:
                with rotation_off(), self._context(model, pair, tokens) as other:
                    other.decode(prompt, 0, 0)
                    context.restore(other.states())
            else:
                context.decode(prompt, 0, 0)
            if self.drop:
                context.drop(1, self.drop)
            parts = []
            for start in range(0, rest.shape[1], self.batch):
                part = rest[:, start : start + self.batch]
                parts.append(context.decode(part, self.n_prompt - self.drop + start, part.shape[1]))
        return np.concatenate(parts, axis=1)

    def _context(self, model: Model, pair: CachePair, tokens: NDArray[np.int32]) -> Sequences:
        return Sequences(
            model,
            pair,
            tokens.shape[1],
            self.n_seq,
            n_ubatch=self.n_ubatch,
            kv_unified=self.unified,
            swa_full=self.drop > 0,  # llama.cpp shifts a cache with a window only if it has cells for the whole context
        )


@contextmanager
def rotation_off() -> Iterator[None]:
    """Contexts made within it do not rotate."""
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["LLAMA_ATTN_ROT_DISABLE"]


def mean_kld(own: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Mean KL divergence, in nats, of logits [.., n_vocab] from reference logits of the same shape."""
    own, reference = (logits.reshape(-1, logits.shape[-1]) for logits in (own, reference))
    return float(perplexity.score(own, reference, np.zeros(len(own), np.int32)).kld.mean())
