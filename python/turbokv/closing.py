"""Base of the classes that own something outside of Python: a model, a context, a process."""

from __future__ import annotations

from typing import Self


class Closing:
    """Leaving the `with` block calls close(), which must be safe to call twice."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
