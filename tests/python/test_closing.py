"""A child process ends with its owner, whenever an interrupt comes."""

import signal
import subprocess
import sys
from typing import Any

import pytest
from turbokv.closing import child
from turbokv.errors import TurbokvError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_a_process_is_started_ends_it(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    started = []

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(number, signal.default_int_handler)  # SIGINT is ignored in a shell's background jobs
    try:
        with pytest.raises(KeyboardInterrupt), child(SLEEP):
            pytest.fail("the interrupt was lost")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert started[0].returncode == -signal.SIGTERM


def test_process_that_does_not_end_when_asked_to_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: wait(self, timeout and 0.2))
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with child([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
    assert process.returncode == -signal.SIGKILL


def test_process_that_cannot_be_started_is_named() -> None:
    with (
        pytest.raises(TurbokvError, match="/no/such/tool cannot be started: No such file or directory"),
        child(["/no/such/tool"]),
    ):
        pytest.fail("started")
