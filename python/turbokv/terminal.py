"""What every command does with the terminal: the result on stdout, progress and notes on stderr, files whole."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from turbokv import data
from turbokv.errors import TurbokvError

out = Console(width=200)  # tables take what their content needs; a cut-off number is no result
err = Console(stderr=True, highlight=False, soft_wrap=True)  # progress and notes; the result alone goes to stdout


def deliver(tables: list[Table], content: str, json_file: Path | None) -> None:
    """Writes the JSON and prints the tables; trouble with one does not keep the other from being delivered."""
    failure: TurbokvError | None = None
    if json_file:
        try:
            data.write_atomically(json_file, content.encode())
        except TurbokvError as error:
            failure = error
    try:
        for table in tables:
            out.print(table)
        sys.stdout.flush()
    except OSError as error:
        not_printed = _not_printed("table", error)
        failure = failure or not_printed
    if failure:
        raise failure


def write_out(text: str) -> None:
    """Writes a whole text to stdout. Raises TurbokvError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise _not_printed("output", error) from error


def _not_printed(what: str, error: OSError) -> TurbokvError:
    """What to say; from here on stdout goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes it again at exit
    return TurbokvError(f"the {what} could not be printed: {error.strerror}")


def number(value: float | None, digits: int, *, sign: str = "") -> str:
    """For a table; `-` for what was not measured."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def interval(ends: tuple[float, float] | None, digits: int) -> str:
    return f"{ends[0]:.{digits}f}..{ends[1]:.{digits}f}" if ends else "-"


def percent(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line per pass in a log; yields what to call with the name of each finished pass."""
    if err.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description:24}"), *columns, console=err) as bar:
            task = bar.add_task("", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)
        return

    started, done = time.monotonic(), 0

    def line(name: str) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - started
        err.print(
            f"[{done}/{total}] {name}, {elapsed:.0f} s, about {elapsed / done * (total - done):.0f} s left",
            markup=False,
        )

    yield line


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt too, or the running llama-bench would outlive this process."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
