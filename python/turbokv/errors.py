"""The exceptions that users see, and the exit codes that they become."""

FAILED, REFUSED, INTERRUPTED = 1, 3, 130  # 2 is wrong usage


class TurbokvError(Exception):
    """Something the user can act on. The message names the cause and the fix; the command prints it and exits 1."""


class CacheRefused(TurbokvError):
    """The model does not take a cache type: a result rather than a fault. The command prints the reason and exits 3."""
