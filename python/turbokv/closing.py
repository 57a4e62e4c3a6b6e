"""Owning something outside of Python, a model, a context, a process, so that it is given back whatever happens."""

from __future__ import annotations

import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from turbokv.errors import TurbokvError


class Closing(ABC):
    """Leaving the `with` block calls close()."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what is owned."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, which has ended when the block is left: asked to at first, killed after 10 s. `options` are Popen's.
    Raises TurbokvError when it cannot be started."""
    with ExitStack() as owned:
        try:
            with _uninterrupted():
                process = subprocess.Popen(command, text=True, errors="replace", **options)
                owned.callback(_end, process)
        except OSError as error:
            raise TurbokvError(f"{command[0]} cannot be started: {error.strerror}. Is it being rebuilt?") from error
        yield process


def _end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait for its end, where they have a Python handler: a process that Popen has started and not
    returned yet has no owner, and would outlive this one."""
    if threading.current_thread() is not threading.main_thread():  # only that one runs handlers
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for waiting in came:
            signal.raise_signal(waiting)
