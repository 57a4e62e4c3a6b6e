"""Records on disk: JSON lines that are only ever appended to, by any number of processes at a time.

A line is written whole under a lock, and on the disk before the lock is given back. What a kill or a full disk leaves
of a line is cut off before the next one is written, and is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from turbokv import data
from turbokv.errors import TurbokvError
from turbokv.record import SCHEMA_VERSION, Record

FILE = "runs.jsonl"
LOCK_TIMEOUT = 60  # seconds; a line takes milliseconds


def runs_file(path: Path) -> Path:
    """The file of records for what a user names: itself, or runs.jsonl in a folder."""
    return path if path.is_file() or path.suffix == ".jsonl" else path / FILE


def read(path: Path) -> list[Record]:
    """All records of a runs.jsonl or of the folder that holds one, in the order in which they were written.

    Raises TurbokvError if there is no file, and for any line that is no record, with its number; only a last line
    without an end, which a kill leaves, is passed over.
    """
    file = runs_file(path)
    try:
        content = file.read_text()
    except FileNotFoundError:
        raise TurbokvError(f"there are no results at {file}: `turbokv sweep -o FOLDER` writes them") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TurbokvError(f"cannot read {file}: {error}") from None
    lines = content.split("\n")[:-1]  # behind the last line end stands nothing, or what a kill left
    return [_parse(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, file: Path, number: int) -> Record:
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        version = _version(line)
        if version is not None and version > SCHEMA_VERSION:
            raise TurbokvError(
                f"{file} line {number} has schema version {version}, and this turbokv knows {SCHEMA_VERSION}: update it"
            ) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise TurbokvError(
            f"{file} line {number} is no record, {where}: {first['msg']}. Mend or delete that line"
        ) from None


def _version(line: str) -> int | None:
    try:
        version = json.loads(line)["schema_version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def latest(records: Iterable[Record]) -> list[Record]:
    """Of the records with the same id the last one, in the order in which each was first measured."""
    return list({record.id: record for record in records}.values())


def append(path: Path, record: Record) -> None:
    """Adds a line. Raises TurbokvError if it cannot be written; then the file is as it was."""
    file = runs_file(path)
    line = (record.model_dump_json() + "\n").encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(file.name + ".lock"), timeout=LOCK_TIMEOUT):
            _append(file, line)
    except Timeout:
        raise TurbokvError(f"{file} has been locked for {LOCK_TIMEOUT} s by another process: is one hanging?") from None
    except OSError as error:
        raise data.cannot_write(file, error) from error


def _append(file: Path, line: bytes) -> None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = _end_of_lines(descriptor)
        try:
            os.ftruncate(descriptor, end)
            written = 0
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], end + written)
            os.fsync(descriptor)
        except BaseException:  # a full disk, or Ctrl-C in the middle of the line
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """Bytes up to and with the last line end."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 4096)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
