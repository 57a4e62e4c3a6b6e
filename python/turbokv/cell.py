"""What a measurement of speed runs: cells, in the order of their rounds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from turbokv.device import ON_CPU, Placement

REQUESTS_PER_SLOT = 3  # of a server in one round: enough that the first prompts do not weigh too much


@dataclass(frozen=True)
class Cell:
    """What one process measures: a cache, K/V. llama-bench behind `depth` tokens, or, with `parallel`, llama-server
    with so many requests at a time."""

    cache: str
    depth: int
    parallel: int | None = None

    @property
    def group(self) -> tuple[int, int | None]:
        """Cells of one group are compared with each other."""
        return self.depth, self.parallel

    def __str__(self) -> str:
        if self.parallel:
            return f"{self.cache} with {self.parallel} request{'s' * (self.parallel != 1)} at a time"
        return f"{self.cache} at depth {self.depth}"


class CellFailed(Exception):
    """This cell was not measured; the message is the reason. Others may work."""


@dataclass(frozen=True)
class Plan:
    """What to measure. n_prompt, n_gen and depths in tokens; parallel in requests; timeout in seconds per cell, None
    for no limit."""

    model: Path
    caches: tuple[str, ...]  # f16/f16 first
    depths: tuple[int, ...]
    n_prompt: int
    n_gen: int
    threads: int
    rounds: int
    seed: int
    timeout: float | None = None
    parallel: tuple[int, ...] = ()
    placement: Placement = ON_CPU

    @property
    def groups(self) -> list[tuple[int, int | None]]:
        return [*((depth, None) for depth in self.depths), *((0, number) for number in self.parallel)]

    def order(self, round_number: int) -> list[Cell]:
        """The cells of a round, from 1, in the order in which they run."""
        rng = random.Random(f"{self.seed} {round_number}")
        groups = rng.sample(self.groups, len(self.groups))
        return [Cell(cache, *group) for group in groups for cache in rng.sample(self.caches, len(self.caches))]

    def n_requests(self, cell: Cell) -> int:
        """Requests that llama-server answers in one round."""
        return REQUESTS_PER_SLOT * (cell.parallel or 0)

    def n_tokens(self, cell: Cell) -> int:
        """Tokens that the process of a cell computes, warm-up included."""
        if cell.parallel:
            return self.n_requests(cell) * (self.n_prompt + self.n_gen)
        return cell.depth + 2 * self.n_prompt + self.n_gen + 1

    def n_ctx(self, cell: Cell) -> int:
        """Tokens of the context in which a cell is measured: the larger of llama-bench's two, or all slots of
        llama-server."""
        if cell.parallel:
            slot = self.n_prompt + self.n_gen + 1
            return cell.parallel * (-(-slot // 256) * 256)  # llama.cpp pads the part of every slot to 256
        return cell.depth + max(self.n_prompt, self.n_gen)


@dataclass(frozen=True)
class Step:
    """What begins now: a cell of a round (from 1), after `done` of `total` measurements. `left` is about how many
    seconds it and all that follow take, None before anything is measured."""

    round: int
    cell: Cell
    done: int
    total: int
    left: float | None
