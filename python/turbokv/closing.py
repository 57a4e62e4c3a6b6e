"""Base of the classes that own something outside of Python: a model, a context, a process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Leaving the `with` block calls close()."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what is owned."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
