"""The exceptions that users see, and the exit codes that they become."""

import signal

FAILED, REFUSED, INTERRUPTED = 1, 3, 130  # 2 is wrong usage


def signal_name(number: int) -> str:
    """SIGKILL for 9: what ended a process, as people know it."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class TurbokvError(Exception):
    """Something the user can act on. The message names the cause and the fix; the command prints it and exits 1."""


class CacheRefused(TurbokvError):
    """The model does not take a cache type: a result rather than a fault. The command prints the reason and exits 3."""
