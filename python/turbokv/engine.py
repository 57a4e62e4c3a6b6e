"""A model and its contexts through libllama: tokens in, logits out as numpy arrays."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbokv import device, native
from turbokv.cache_type import F16, CachePair, type_ids
from turbokv.closing import Closing
from turbokv.errors import CacheRefused, TurbokvError

MAX_BATCH = 2048  # llama-perplexity's defaults, so that both compute the same batches
MAX_UBATCH = 512

LOG_ERROR, LOG_CONT = 4, 5  # enum ggml_log_level


class _Log:
    """Keeps the last lines that llama.cpp logged, to quote them when something fails."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=400)
        self._callback: Any = None  # ctypes frees a callback that nothing refers to

    def install(self) -> None:
        if self._callback is None:
            lib = native.llama()
            self._callback = lib.llama_log_callback(self._append)
            lib.llama_log_set(self._callback, None)

    def _append(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode(errors="replace")
        if level == LOG_CONT and self.lines:
            level, start = self.lines.pop()
            line = start + line
        self.lines.append((level, line))

    def errors(self) -> str:
        """The error lines since the last clear(), one string."""
        found = [line.strip() for level, line in self.lines if level == LOG_ERROR and line.strip()]
        return "; ".join(found) or "llama.cpp gave no reason"

    def clear(self) -> None:
        self.lines.clear()


log = _Log()


class _Interrupts:
    """Ctrl-C as a flag. Python would run its own handler inside llama.cpp's log callback too, and ctypes drops what
    a callback raises: the interrupt would be lost."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it Ctrl-C becomes a KeyboardInterrupt of the next check(); a second one ends the process at once."""

        def on_signal(*_: object) -> None:
            if self.requested:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            self.requested = True

        self.requested = False
        previous = signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt


interrupts = _Interrupts()


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Model(Closing):
    """A GGUF model, loaded once and shared by the contexts of all caches. Use as a context manager.

    Weights that hold NaN or infinity are refused: llama.cpp's CPU kernels quantize activations to q8_0, which makes
    finite numbers of NaN, so that the logits need not show it. Raises TurbokvError.
    With no_alloc only the header is read and nothing can be computed: for sizes, see memory.py. placement: which
    layers are on a GPU; left out, all where there is one. The cache of a layer lies where the layer does.
    """

    def __init__(self, path: Path, *, no_alloc: bool = False, placement: device.Placement | None = None) -> None:
        if not path.is_file():
            raise TurbokvError(f"there is no model at {path}")
        self.path = path
        self.placement = device.placement() if placement is None else placement
        self._lib = native.llama()
        log.install()
        log.clear()
        params = self._lib.llama_model_default_params()
        params.check_tensors = not no_alloc
        params.n_gpu_layers = self.placement.gpu_layers
        self._no_devices = (ctypes.c_void_p * 1)()
        if not self.placement.on_gpu:  # else a GPU would multiply the large batches
            params.devices = ctypes.addressof(self._no_devices)
        if no_alloc:
            params.no_alloc, params.load_mode = True, 0  # LLAMA_LOAD_MODE_NONE: nothing to map
        self.handle = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            if damaged := re.findall("tensor '(.*?)' has invalid data", log.errors()):
                more = f" and {len(damaged) - 1} more hold" if len(damaged) > 1 else " holds"
                raise TurbokvError(
                    f"{path} is damaged: tensor {damaged[0]}{more} NaN or infinite values. "
                    "Download or convert the model again"
                )
            raise TurbokvError(
                f"{path} cannot be loaded: {log.errors()}. Is the download complete, and is it a GGUF model?"
            )
        self._vocab = self._lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = self._lib.llama_model_n_ctx_train(self.handle)
        self.bos: int | None = (
            self._lib.llama_vocab_bos(self._vocab) if self._lib.llama_vocab_get_add_bos(self._vocab) else None
        )

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids of the whole text, with BOS in front if the model wants one and add_special is set. With
        parse_special the names of special tokens in the text, such as `<|im_start|>`, become these tokens."""
        data = text.encode()
        room = len(data) + 2  # no tokenizer makes more tokens than bytes, plus BOS and EOS
        tokens = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
        if count < 0:
            raise TurbokvError(f"the tokenizer of {self.path.name} failed on the text")
        return np.ctypeslib.as_array(tokens)[:count].copy()

    def chat_template(self) -> str | None:
        """The Jinja chat template of the model's metadata, None if it has none."""
        template: bytes | None = self._lib.llama_model_chat_template(self.handle, None)
        return None if template is None else template.decode()

    def special_texts(self) -> dict[str, str]:
        """How the vocabulary writes `bos_token` and `eos_token`; empty for one that there is not."""
        lib = self._lib
        ids = {"bos_token": lib.llama_vocab_bos(self._vocab), "eos_token": lib.llama_vocab_eos(self._vocab)}
        return {name: lib.llama_vocab_get_text(self._vocab, i).decode() if i >= 0 else "" for name, i in ids.items()}

    def detokenize(self, tokens: NDArray[np.int32]) -> bytes:
        """The bytes of the tokens [n] one after the other; control tokens such as BOS have none. Nothing is cleaned
        up, unlike in llama_detokenize, which drops spaces before punctuation: a tokenizer that loses nothing gives
        back what was tokenized, but for a space that some put in front."""
        pieces = {token: self._piece(token) for token in np.unique(tokens).tolist()}
        return b"".join(pieces[token] for token in tokens.tolist())

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size: int = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def effective(self, pair: CachePair) -> CachePair:
        """The types that serve this model's head sizes, e.g. turbo3 -> turbo3_64. Raises CacheRefused if none does."""
        names = {type_id: name for name, type_id in type_ids().items()}
        type_k, type_v = ctypes.c_int(type_ids()[pair.k]), ctypes.c_int(type_ids()[pair.v])
        log.clear()
        if not self._lib._lib.turbokv_resolve_cache_types(self.handle, ctypes.byref(type_k), ctypes.byref(type_v)):
            raise CacheRefused(log.errors().removeprefix("turbokv: "))
        return CachePair(names[type_k.value], names[type_v.value])

    def close(self) -> None:
        if self.handle:
            self._lib.llama_model_free(self.handle)
            self.handle = None


class Context(Closing):
    """One sequence of up to n_ctx tokens with a given cache. Use as a context manager.

    n_batch: tokens per call of llama_decode and per pass through the graph; 1 decodes as generation does. n_ubatch:
    per pass through the graph only, at most n_batch. Left out, both are as large as in llama.cpp's tools. Raises
    CacheRefused if the model does not take this cache, TurbokvError if there is not enough memory for it.
    """

    def __init__(
        self,
        model: Model,
        pair: CachePair,
        n_ctx: int,
        n_threads: int,
        *,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
    ) -> None:
        self.model = model
        self._lib = native.llama()
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(n_ctx, n_batch or MAX_BATCH)
        params.n_ubatch = min(params.n_batch, n_ubatch or n_batch or MAX_UBATCH)
        params.swa_full = False  # as in llama.cpp's tools: layers with a sliding window cache the window only
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = type_ids()[pair.k], type_ids()[pair.v]
        interrupts.check()
        log.clear()
        self.handle = self._lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            reason = log.errors()
            no_memory = "alloc" in reason  # the one other thing that goes wrong here: "failed to allocate buffer ..."
            error = TurbokvError if no_memory or pair == F16 else CacheRefused
            raise error(f"no context with cache {pair} for {model.path.name}: {reason}")
        self.n_batch: int = params.n_batch
        self.cache_bytes: int = self._lib._lib.turbokv_cache_bytes(self.handle)

    def logits(self, tokens: NDArray[np.int32], first: int) -> Iterator[NDArray[np.float32]]:
        """Decodes tokens [n] from an empty cache; yields the logits of positions first.. as float32 [m, n_vocab],
        one array per batch. Each array is libllama's own memory: valid until the next one is asked for."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self.handle), True)
        for start in range(0, len(tokens), self.n_batch):
            logits = self._decode(tokens[start : start + self.n_batch], start, first)
            if len(logits):
                yield logits

    def repeat(self, tokens: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """Decodes tokens[position] alone, on the cache as earlier calls filled it up to there; what lay behind is
        dropped. Logits [1, n_vocab], libllama's own memory again."""
        if not self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self.handle), 0, position, -1):
            raise TurbokvError(f"the cache of {self.model.path.name} cannot be cut at token {position}")
        return self._decode(tokens[position : position + 1], position, position)

    def cut(self, position: int) -> bool:
        """Drops what lies at `position` and behind it. False if the memory no longer holds all that is needed to go on
        from there: a recurrent state has moved on, a sliding window has let go of its older tokens."""
        memory = self._lib.llama_get_memory(self.handle)
        if not self._lib.llama_memory_seq_rm(memory, 0, position, -1):
            return False
        window = self._lib.llama_model_n_swa(self.model.handle)
        oldest: int = self._lib.llama_memory_seq_pos_min(memory, 0)
        return not window or oldest <= max(0, position - window)

    def append(self, tokens: NDArray[np.int32], position: int, n_logits: int) -> NDArray[np.float32]:
        """Decodes tokens at the positions position.., which must be the next ones; logits of the last n_logits of them,
        [n_logits, n_vocab], a copy."""
        first = position + len(tokens) - n_logits
        starts = range(0, len(tokens), self.n_batch)
        return np.concatenate([self._decode(tokens[i : i + self.n_batch], position + i, first).copy() for i in starts])

    def _decode(self, tokens: NDArray[np.int32], start: int, first: int) -> NDArray[np.float32]:
        """Appends one batch of tokens at the positions start..; logits of the positions first.. among them."""
        lib = self._lib
        n_outputs = min(len(tokens), max(0, start + len(tokens) - first))
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            for i, token in enumerate(tokens.tolist()):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = start + i >= first
            batch.n_tokens = len(tokens)
            status = lib.llama_decode(self.handle, batch)
        finally:
            lib.llama_batch_free(batch)
        interrupts.check()
        if status:
            raise TurbokvError(f"llama_decode failed with status {status}: {log.errors()}")
        if not n_outputs:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self.handle), (n_outputs, self.model.n_vocab))

    def close(self) -> None:
        if self.handle:
            self._lib.llama_free(self.handle)
            self.handle = None
