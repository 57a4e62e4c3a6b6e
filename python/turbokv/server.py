"""A llama-server of our build as a child process: start, wait until it answers, ask, stop."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from turbokv import native
from turbokv.closing import Closing, child
from turbokv.errors import TurbokvError, signal_name

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never through a proxy

START_TIMEOUT = 120  # seconds until the model must be loaded
REQUEST_TIMEOUT = 300

ERROR = re.compile(r"[\d.]+ E +(?:\w+ +\w+: )?(.+)")  # a line of the server's log: time, level, component, function


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def first_error(log: str) -> str:
    """What went wrong, out of a server's log: its first error, or the last lines where there is none, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := ERROR.match(line))]
    return "; ".join(errors[:1] or lines[-3:]) or "it logged nothing"


class Server(Closing):
    """llama-server on a free loopback port. Use as a context manager: leaving it stops the process.

    `arguments` go to llama-server as they are. Raises TurbokvError, with what the server logged, when the server ends
    before it answers, or does not answer within start_timeout seconds (None: START_TIMEOUT).
    """

    def __init__(self, model: Path, arguments: list[str], start_timeout: float | None = None) -> None:
        self.url = f"http://127.0.0.1:{(port := _free_port())}"
        self._owned = ExitStack()
        log = tempfile.NamedTemporaryFile(prefix="turbokv-server-", suffix=".log")  # noqa: SIM115 closed in close()
        self._log = self._owned.enter_context(log)
        command = [
            native.tool("llama-server"),
            "--model",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *arguments,
        ]
        try:
            running = child(list(map(str, command)), stdout=self._log, stderr=subprocess.STDOUT)
            self._process = self._owned.enter_context(running)
            self.pid = self._process.pid
            self._wait(start_timeout or START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def log(self) -> str:
        """All that the server has logged so far."""
        return Path(self._log.name).read_text(errors="replace")

    def ended(self) -> str | None:
        """How it ended, "with status 1" or "by SIGKILL"; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return f"by {signal_name(-status)}" if status < 0 else f"with status {status}"

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if ended := self.ended():
                tail = "\n".join(self.log().splitlines()[-12:])
                raise TurbokvError(f"llama-server ended {ended} before it answered:\n{tail}")
            try:
                with _direct.open(self.url + "/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)  # not listening yet, or 503 while the model loads
        raise TurbokvError(f"llama-server did not answer within {timeout:g} s")

    def post(self, path: str, request: dict[str, Any], timeout: float | None = REQUEST_TIMEOUT) -> dict[str, Any]:
        """Sends a JSON request, e.g. to /completion, and returns the JSON reply. timeout in seconds, None for none."""
        body = json.dumps(request).encode()
        post = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with _direct.open(post, timeout=timeout) as response:
            reply: dict[str, Any] = json.load(response)
            return reply

    def kill(self) -> None:
        """Ends it at once; close() is still to be called."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._owned.close()
