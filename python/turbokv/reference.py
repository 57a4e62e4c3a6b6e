"""What the f16 cache predicts over a window of text: 16 bits per entry of the vocabulary, and a folder to keep it in.

Every KL divergence is taken from the encoded reference, whether it comes from the disk or was computed a moment ago,
so that no number depends on the cache. A row of logits is rounded to 65536 steps of equal size from its smallest to
its largest value, and its probabilities are normalized again after decoding. With a step s the errors of the entries
are independent and below s/2: they lift a KLD by about s^2/24 in the mean, and scatter that of one token by about
s/sqrt(12) * sqrt(sum p^2 (log p/q)^2). Rows of the built-in models span 26 nats, so s is 0.0004.

NLL and most likely token are taken from the logits before rounding, and so is a digest by which a row that is the
reference's own, bit for bit, is recognized: its divergence is exactly 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turbokv import data, engine, native
from turbokv.device import ON_CPU, Placement
from turbokv.fingerprint import model_fingerprint, text_fingerprint

SCHEME = 1  # of the files: raised when what stands in them, or how it is computed, changes
LIMIT = 10 << 30  # bytes that all keys together may take
STALE = 3600  # seconds after which a half-written file belongs to nobody
ROWS = 16  # logit rows handled at a time: float64 copies of more would not stay in the CPU's caches
STEPS = 65535

Arrays = dict[str, NDArray[np.generic]]


def log_normalizer(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(sum(exp(logits))) over the last axis, [n, n_vocab] -> [n]."""
    top = logits.max(axis=-1)
    shifted: NDArray[np.float64] = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return shifted


def log_probabilities(
    logits: NDArray[np.float32], targets: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities [n, n_vocab] of logits of that shape, and the NLL [n] of the true next tokens, in nats; NaN
    for rows with a NaN or infinite logit."""
    own = logits.astype(np.float64)
    own -= log_normalizer(own)[:, None]
    nll = -own[np.arange(len(own)), targets]
    nll[~np.isfinite(own).all(axis=-1)] = np.nan
    return own, nll


@dataclass(frozen=True)
class Reference:
    """Encoded predictions for n positions. A row with a NaN or infinite logit has NLL and step NaN."""

    codes: NDArray[np.uint16]  # [n, n_vocab], steps above the smallest logit of the row
    step: NDArray[np.float32]  # [n], nats
    normalizer: NDArray[np.float64]  # [n], log(sum(exp(step * codes)))
    nll: NDArray[np.float64]  # [n], of the true next token
    top: NDArray[np.int32]  # [n], most likely token
    digest: NDArray[np.uint64]  # [n], of the float32 logits

    def __getitem__(self, rows: slice) -> Reference:
        return Reference(**{name: array[rows] for name, array in vars(self).items()})

    def log_p(self) -> NDArray[np.float64]:
        """Log-probabilities [n, n_vocab], whose exp() sum to 1."""
        decoded: NDArray[np.float64] = self.step[:, None].astype(np.float64) * self.codes
        decoded -= self.normalizer[:, None]
        return decoded

    def equals(self, logits: NDArray[np.float32], nll: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which rows of these logits [n, n_vocab], with these NLL [n], are the reference's own, bit for bit."""
        equal: NDArray[np.bool_] = nll == self.nll  # the digests are slow, and needed for these alone
        rows = np.flatnonzero(equal)
        equal[rows] = _digests(logits[rows]) == self.digest[rows]
        return equal


def encode(batches: Iterable[NDArray[np.float32]], targets: NDArray[np.int32], n_vocab: int) -> Reference:
    """Encodes logits [m, n_vocab] that come in batches, until every target [n] has its row; further rows are dropped.

    A batch is used before the next one is asked for.
    """
    n = len(targets)
    reference = Reference(
        np.zeros((n, n_vocab), np.uint16),
        np.empty(n, np.float32),
        np.empty(n),
        np.empty(n),
        np.empty(n, np.int32),
        np.empty(n, np.uint64),
    )
    row = 0
    for batch in batches:
        for start in range(0, len(batch), ROWS):
            logits = batch[start : start + ROWS][: n - row]
            _encode(logits, targets[row : row + len(logits)], reference[row : row + len(logits)])
            row += len(logits)
    return reference


def _encode(logits: NDArray[np.float32], targets: NDArray[np.int32], out: Reference) -> None:
    """Fills the rows `out`, which are views."""
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, out.nll[:] = log_probabilities(logits, targets)
        low = log_p.min(axis=-1)
        out.step[:] = (log_p.max(axis=-1) - low) / STEPS
        out.step[np.isnan(out.nll)] = np.nan
        out.top[:] = logits.argmax(axis=-1)
        out.digest[:] = _digests(logits)
        steps = out.step.astype(np.float64)
        log_p -= low[:, None]
        log_p /= np.where(steps > 0, steps, 1)[:, None]  # 0 if all logits are equal
        rounded = np.rint(log_p, out=log_p)
        rounded[np.isnan(steps)] = 0
        out.codes[:] = rounded
        rounded *= steps[:, None]
        out.normalizer[:] = log_normalizer(rounded)


def _digests(logits: NDArray[np.float32]) -> NDArray[np.uint64]:
    return np.array(
        [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in logits], np.uint64
    )


# --- on disk


def default_directory() -> Path:
    return data.cache_dir() / "reference"


def key(model: Path, text: str, *, n_ctx: int, path: str, n_threads: int, placement: Placement = ON_CPU) -> str:
    """16 hex digits of what the reference depends on. The number of threads does not change what a batch gives, but
    what decoding gives: llama.cpp splits the f16 attention of a single token among them. A GPU gives other bits than a
    CPU, and each number of layers on it others again."""
    from turbokv.doctor import cpu_name  # which measures, too, and so imports this module

    parts = [
        SCHEME, model_fingerprint(model), text_fingerprint(text), n_ctx, path, engine.MAX_BATCH, engine.MAX_UBATCH,
        n_threads, native.build_id(), cpu_name(), np.__version__, *placement.identity().values(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Store:
    """The files of one key: named arrays, a file per window, each written whole or not at all.

    They are .npz files, whose CRC-32 shows when one is damaged. Trouble is told to `note` and ends nothing: a file
    that cannot be used is as good as absent, and where nothing can be written nothing is kept. Several processes may
    use a folder at once. Raises nothing.
    """

    def __init__(self, directory: Path, key: str, note: Callable[[str], None], limit: int = LIMIT) -> None:
        self.directory, self.folder = directory, directory / key
        self._note, self._limit = note, limit
        self._keeping = True
        self._told = False
        try:
            if self.folder.is_dir():
                os.utime(self.folder)  # used now: the last to be dropped
            for path in self.folder.glob("*.tmp"):  # of a process that was killed
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()
        except OSError:
            pass  # _save says it, if it still is in the way

    def load(self, name: str, tokens: NDArray[np.int32], names: Iterable[str]) -> Arrays | None:
        """The arrays `names` that were saved for the window `tokens`; None if there are none, or damaged ones."""
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {field: file[field] for field in ("tokens", *names)}
            if not np.array_equal(arrays.pop("tokens"), tokens):
                raise ValueError("it belongs to other tokens")
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged zip raises nearly anything
            self._note(f"note: {path} cannot be used ({error or type(error).__name__}); it is computed again")
            return None
        if not self._told:
            self._told = True
            self._note(
                f"note: what f16 predicts was computed before and comes from {self.folder}; "
                "--no-reference-cache computes it again"
            )
        return arrays

    def save(self, name: str, tokens: NDArray[np.int32], arrays: Arrays) -> None:
        if not self._keeping:
            return
        size = sum(array.nbytes for array in arrays.values())
        try:
            if not self._make_room(size):
                self._stop(f"they would take more than {self._limit / 2**30:g} GiB")
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            try:
                with temporary.open("wb") as file:
                    _write_npz(file, {"tokens": tokens, **arrays})
                temporary.replace(self.folder / f"{name}.npz")
            finally:
                temporary.unlink(missing_ok=True)
        except (FileNotFoundError, FileExistsError):  # another process drops this key; mkdir raises the latter then
            return
        except OSError as error:
            self._stop(f"{error.strerror or error}")

    def _stop(self, reason: str) -> None:
        self._keeping = False
        self._note(f"note: reference windows are not kept in {self.folder}: {reason}. --reference-cache names a place")

    def _make_room(self, size: int) -> bool:
        """Drops the keys that were not used for longest until `size` more bytes fit; False if they cannot."""
        used: list[tuple[float, int, Path]] = []
        for folder in self.directory.glob("[0-9a-f]" * 16):
            try:
                used.append((folder.stat().st_mtime, sum(path.stat().st_size for path in folder.glob("*.npz")), folder))
            except OSError:  # another process drops it right now
                continue
        total = size + sum(taken for _, taken, _ in used)
        for _, taken, folder in sorted(used):
            if total <= self._limit:
                break
            if folder != self.folder:
                _drop(folder)
                total -= taken
        return total <= self._limit


def _drop(folder: Path) -> None:
    """Removes a key; files that are none of ours stay."""
    for path in [*folder.glob("*.npz"), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_npz(file: object, arrays: Arrays) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]
