"""Samples of speed, and the file that keeps them as soon as they are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from turbokv import data
from turbokv.cell import Cell
from turbokv.errors import TurbokvError


@dataclass(frozen=True)
class Sample:
    """One cell in one round, a line of the samples file. pp and tg in tokens/s, None if they were not asked for; of
    llama-server tg is that of all requests together, and pp the median over the requests. seconds is how long the
    whole process took, peak_bytes its largest resident memory, joules the energy of the machine meanwhile, latencies
    seconds per request. The fields with a default are not in files of older versions, and are left out where they
    are None."""

    round: int  # from 1
    cache: str
    depth: int
    pp: float | None
    tg: float | None
    seconds: float
    peak_bytes: int | None = None
    joules: float | None = None
    parallel: int | None = None
    latencies: list[float] | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.cache, self.depth, self.parallel)

    def line(self) -> str:
        optional = {field.name for field in fields(self) if field.default is None}
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None or k not in optional}) + "\n"


def samples_path(json_file: Path) -> Path | None:
    """Where the samples for a --json file are kept; None if that is a device or a pipe."""
    return json_file.with_name(json_file.name + ".samples") if json_file.is_file() or not json_file.exists() else None


class SamplesFile:
    """JSON lines: the settings, then one line per sample. It is whole after every append(), so that a run that was
    killed goes on from there. Without a path nothing is kept."""

    def __init__(self, path: Path | None, current: dict[str, Any]) -> None:
        """Raises TurbokvError if the file is damaged or holds samples of other settings."""
        self.path = path
        self.samples: list[Sample] = []
        self._header = json.dumps({"settings": current}) + "\n"
        self._content = ""  # of the file, as this process knows it
        if path and path.exists():
            self._load(path, current)

    def _load(self, path: Path, current: dict[str, Any]) -> None:
        content, number = path.read_text(errors="replace"), 1
        try:
            first, *lines = content.splitlines()
            recorded = dict(json.loads(first)["settings"])
            for line in lines:
                number += 1
                self.samples.append(Sample(**json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise TurbokvError(
                f"{path} is damaged in line {number}: name another --json to keep it, or delete it to start again"
            ) from None
        if recorded != current:
            raise TurbokvError(
                f"{path} holds other measurements, {differences(recorded, current)}: name another --json to keep "
                "them, or delete it to start again"
            )
        self._content = content

    def append(self, sample: Sample) -> None:
        """Adds a sample, on disk first. Raises TurbokvError; then the file is as it was."""
        content = (self._content or self._header) + sample.line()
        if self.path:
            if (self.path.read_text() if self.path.exists() else "") != self._content:
                raise TurbokvError(f"{self.path} was changed by something else: is the same command running twice?")
            data.write_atomically(self.path, content.encode())
        self._content = content
        self.samples.append(sample)


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> str:
    """What changed between two settings, for an error message."""

    def show(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(
        f"{key} {show(recorded.get(key))} (now {show(current.get(key))})"
        for key in (*current, *(recorded.keys() - current.keys()))
        if recorded.get(key) != current.get(key)
    )
