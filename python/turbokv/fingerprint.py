"""What a model and a text are known by: short hashes of their content, not of their names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from turbokv.errors import TurbokvError

BLOCK = 1 << 16
BLOCKS = 512  # read of a model: 32 MiB; hashing 40 GiB would take minutes


def model_fingerprint(path: Path) -> str:
    """16 hex digits of the SHA-256 of the size and the content of a model; of files above 32 MiB 512 blocks of 64 KiB
    are read, spread evenly from the first byte to the last. Raises TurbokvError if it cannot be read."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            if size <= BLOCKS * BLOCK:
                digest.update(file.read())
            else:
                for i in range(BLOCKS):
                    file.seek(i * (size - BLOCK) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    except FileNotFoundError:
        raise TurbokvError(f"there is no model at {path}") from None
    except OSError as error:
        raise TurbokvError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()[:16]


def text_fingerprint(text: str) -> str:
    """16 hex digits of the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
