"""One llama-server under load: how much it generates for several requests at a time.

The server gets as many slots as there are requests at a time, each with room for its prompt and its answer, and no
prompt cache. Every prompt is another piece of the built-in text, as token ids, so that nothing of it can be reused.
Each of `parallel` clients sends one request after the other, REQUESTS_PER_SLOT of them; all ask for exactly n_gen
tokens, the most likely ones. A short request before that warms the server up.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from turbokv import data
from turbokv.bench import Measured, peak_bytes
from turbokv.cell import Cell, CellFailed, Plan
from turbokv.energy import Meter
from turbokv.errors import TurbokvError
from turbokv.server import Server, first_error

POLL = 1.0  # seconds between two readings of energy


def arguments(plan: Plan, cell: Cell) -> list[str]:
    """llama-server's, behind model and port."""
    k, v = cell.cache.split("/")
    options = {
        "--cache-type-k": k,
        "--cache-type-v": v,
        "--ctx-size": plan.n_ctx(cell),
        "--parallel": cell.parallel,
        "--threads": plan.threads,
        "--flash-attn": "on",
        "--cache-ram": 0,
    }
    return [str(word) for option in options.items() for word in option] + plan.placement.server_arguments()


def prompts(tokens: list[int], n_prompt: int, count: int, seed: str) -> list[list[int]]:
    """`count` pieces of a text of tokens, n_prompt each, from places spread evenly over it, the first a random one; a
    text that is too short begins again."""
    first = random.Random(seed).randrange(len(tokens))
    starts = [first + i * len(tokens) // count for i in range(count)]
    return [[tokens[(start + i) % len(tokens)] for i in range(n_prompt)] for start in starts]


def serve(plan: Plan, cell: Cell, round_number: int, meter: Meter | None = None) -> Measured:
    """Starts a server, sends it all requests of one round, and stops it. Raises CellFailed with the reason."""
    started = time.monotonic()

    def left() -> float | None:
        """Seconds until --timeout, None for no limit."""
        if plan.timeout is None:
            return None
        return max(0.001, plan.timeout - (time.monotonic() - started))

    try:
        # the server ends first, so that the clients do not wait for answers when this is interrupted
        with ThreadPoolExecutor(cell.parallel) as clients, Server(plan.model, arguments(plan, cell), left()) as server:
            try:
                return _load(plan, cell, round_number, server, clients, left, meter)
            except BaseException as error:
                reason = _reason(error, plan, server)
                server.kill()  # others still wait for answers, and a server that is asked to stop then may never do so
                if reason is None:
                    raise
                raise CellFailed(reason) from None
    except TurbokvError as error:
        first, _, log = str(error).partition("\n")
        raise CellFailed(f"{first} {first_error(log)}" if log else first) from None


def _load(
    plan: Plan,
    cell: Cell,
    round_number: int,
    server: Server,
    clients: ThreadPoolExecutor,
    left: Callable[[], float | None],
    meter: Meter | None,
) -> Measured:
    """All requests of one round. Raises what urllib raises, and CellFailed for an answer of another length."""
    tokens = server.post("/tokenize", {"content": data.SAMPLE.read_text()}, left())["tokens"]
    count = plan.n_requests(cell)
    pieces = prompts(tokens, plan.n_prompt, count, f"{plan.seed} {round_number}")

    def ask(prompt: list[int], n_gen: int = plan.n_gen) -> tuple[float, float]:
        """Seconds until the whole answer was there, and the prompt's tokens/s by the server's clock."""
        request = {"prompt": prompt, "n_predict": n_gen, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        sent = time.monotonic()
        try:
            reply = server.post("/completion", request, left())
        except urllib.error.HTTPError as error:
            with error:  # an answer that is left unread keeps the server from stopping
                raise CellFailed(f"llama-server answered {error.code}: {_message(error)}") from None
        seconds = time.monotonic() - sent
        if (reply["tokens_evaluated"], reply["tokens_predicted"]) != (len(prompt), n_gen):
            raise CellFailed(
                f"llama-server read {reply['tokens_evaluated']} of {len(prompt)} tokens and generated "
                f"{reply['tokens_predicted']} of {n_gen}"
            )
        return seconds, float(reply["timings"]["prompt_per_second"])

    ask(pieces[0][:16], 1)
    joules_before = meter.joules() if meter else None
    begin = time.monotonic()
    futures = [clients.submit(ask, piece) for piece in pieces]
    try:
        while wait(futures, POLL, FIRST_EXCEPTION).not_done and not any(map(_failed, futures)):
            if meter:
                meter.joules()
        seconds = time.monotonic() - begin
        answers = [future.result() for future in futures if future.done()]
    finally:
        for future in futures:
            future.cancel()
    joules_after = meter.joules() if meter else None
    return Measured(
        pp=statistics.median(speed for _, speed in answers),
        tg=count * plan.n_gen / seconds,
        peak_bytes=peak_bytes(server.pid),
        joules=joules_after - joules_before if joules_after is not None and joules_before is not None else None,
        latencies=[round(latency, 6) for latency, _ in answers],
    )


def _reason(error: BaseException, plan: Plan, server: Server) -> str | None:
    """Why a server that has started was not measured; None if it is not the server's fault."""
    if isinstance(error, TimeoutError):
        return f"not finished within --timeout {plan.timeout or 0:g} seconds"
    if isinstance(error, OSError | http.client.HTTPException):  # URLError too
        how = f"ended {ended}" if (ended := server.ended()) else f"stopped answering ({error})"
        return f"llama-server {how}: {first_error(server.log())}"
    if isinstance(error, KeyError | TypeError | ValueError):
        return f"llama-server gave an answer that is not understood: {error!r}"
    return None


def _failed(future: Future[tuple[float, float]]) -> bool:
    return future.done() and future.exception() is not None


def _message(error: urllib.error.HTTPError) -> str:
    """What llama-server says in the body of an error, {"error": {"message": ...}}."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return error.reason
