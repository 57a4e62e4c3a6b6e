"""Models and texts: what the package carries, and the one text that it can download."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import os
import shutil
import urllib.request
import zipfile
import zlib
from pathlib import Path

from turbokv.errors import TurbokvError
from turbokv.native import PACKAGE

DATA = PACKAGE / "data"
MINI = DATA / "mini-q8_0.gguf"  # head_dim 128; model card in data/README.md
BIAS = DATA / "bias-q8_0.gguf"  # head_dim 64
SAMPLE = DATA / "sample.txt"
BUILT_IN = {"mini": MINI, "bias": BIAS}
NEEDLE_WORDS = DATA / "needle_words.json"  # the names and words that the models were trained on

WIKITEXT2_URL = "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
WIKITEXT2_MEMBER = "wikitext-2-raw/wiki.test.raw"
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"  # of the unpacked test text


def model_path(name: str | Path) -> Path:
    """The model for a -m argument: `mini` and `bias` are the built-in ones, all else is a file."""
    return BUILT_IN.get(str(name), Path(name))


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "turbokv"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes the whole file or nothing: a full disk or a kill leaves the old file, and no half of a new one.

    Devices and pipes such as /dev/stdout are written to as they are. Raises TurbokvError.
    """
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> TurbokvError:
    """What to say of a file that could not be written, with the fix."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space" if full else "Choose another place"
    return TurbokvError(f"cannot write {path}: {error.strerror}. {fix} and run it again")


def check_writable(path: Path) -> None:
    """Fails now rather than after an hour of measuring: an empty file beside it is really written and removed."""
    if path.is_dir():
        raise TurbokvError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise TurbokvError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_file() or not path.exists():
        probe = path.with_name(f".turbokv-{os.getpid()}.probe")
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TurbokvError(f"cannot write {path}: {error.strerror}. Choose another place") from error


def wikitext2(url: str = WIKITEXT2_URL, sha256: str = WIKITEXT2_SHA256) -> Path:
    """Path of WikiText-2's raw test text, downloaded once and checked. CC BY-SA 3.0."""
    path = cache_dir() / "wiki.test.raw"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            text = zipfile.ZipFile(io.BytesIO(response.read())).read(WIKITEXT2_MEMBER)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise TurbokvError(
            f"WikiText-2 could not be downloaded from {url}: {error}. "
            "Without a network use the built-in text (leave -f out) or a text file of your own (-f FILE)"
        ) from error
    found = hashlib.sha256(text).hexdigest()
    if found != sha256:
        raise TurbokvError(f"{url} gave a wiki.test.raw with SHA-256 {found}, expected {sha256}; it was not kept")
    write_atomically(path, text)
    return path


def read_text(name: str | None) -> str:
    """The text for a -f argument: None is the built-in sample, `wikitext2` is downloaded, all else is a file."""
    path = SAMPLE if name is None else wikitext2() if name == "wikitext2" else Path(name)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TurbokvError(
            f"there is no text at {path}; give a file, wikitext2, or nothing for the built-in text"
        ) from None
    except UnicodeDecodeError as error:
        raise TurbokvError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise TurbokvError(f"cannot read {path}: {error.strerror}") from None
    return text


def read_texts(name: str | None) -> str:
    """As read_text, and of a folder all .txt files, joined in the order of their names."""
    if name is None or not Path(name).is_dir():
        return read_text(name)
    files = sorted(Path(name).glob("*.txt"))
    if not files:
        raise TurbokvError(f"the folder {name} has no .txt files: give another one, or a file")
    return "\n".join(read_text(str(file)) for file in files)
