"""What a sweep is to measure: a TOML file, or the flags of `turbokv sweep`.

    models = ["mini", "model.gguf"]        # built-in names, or files as seen from where the command runs
    caches = "f16,q8_0,turbo4,q8_0/turbo3" # or a list
    threads = 0                            # 0: all cores of the process
    gpu_layers = "all"                     # or a number; left out: all where there is a GPU, else 0

    [kld]                                  # a task that is not there is not measured
    ctx = [512, 2048, 8192]
    tokens = 8192                          # per context, at least one window
    [needle]
    [speed]
    depths = [0, 2048]
    caches = "q8_0,turbo3"                 # instead of the caches above, for this task; `models` likewise
    [server]
    parallel = [1, 4]

Everything but `models` and one task has a default. Unknown names are errors.
"""

from __future__ import annotations

import tomllib
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from turbokv import cache_type, data
from turbokv.cache_type import DEFAULT_CACHES
from turbokv.errors import TurbokvError
from turbokv.fingerprint import text_fingerprint

Call = tuple[tuple[str, ...], int]  # arguments of the command, and about how many tokens it computes with one cache
Positive = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Models = Annotated[list[str], Field(min_length=1)]
Caches = Annotated[list[str], BeforeValidator(_split), Field(min_length=1)]


class Task(Part):
    """One table of the plan. Its calls are in the order of their size; a rung of the sweep has one of each task."""

    name: ClassVar[str]
    command: ClassVar[str]  # of turbokv
    timed: ClassVar[bool] = False  # whether it measures time, which depends on the number of threads
    models: Models | None = None
    caches: Caches | None = None

    @abstractmethod
    def calls(self) -> list[Call]:
        """Of `turbokv {command}`, without model and cache, the smallest first."""

    def text_fingerprint(self) -> str | None:
        return None


class OnText(Task):
    """A task that reads a text: a file, `wikitext2`, or the built-in sample."""

    text: str | None = None

    def content(self) -> str:
        return data.read_text(self.text)

    def text_arguments(self) -> tuple[str, ...]:
        return ("-f", self.text) if self.text else ()

    def text_fingerprint(self) -> str | None:
        return text_fingerprint(self.content())


class Kld(OnText):
    name: ClassVar[str] = "kld"
    command: ClassVar[str] = "kld"
    ctx: list[Annotated[int, Field(ge=16)]] = [512, 2048, 8192]
    tokens: Positive = 8192
    path: Literal["prefill", "decode"] = "prefill"

    def calls(self) -> list[Call]:
        return [self._call(ctx) for ctx in sorted(self.ctx)]

    def _call(self, ctx: int) -> Call:
        chunks = max(1, self.tokens // ctx)
        path = ("--path", self.path) if self.path != "prefill" else ()
        return (*self.text_arguments(), "-c", str(ctx), "--chunks", str(chunks), *path), ctx * chunks


class Needle(OnText):
    name: ClassVar[str] = "needle"
    command: ClassVar[str] = "needle"
    lengths: list[Positive] = [512, 1024, 2048]
    depths: list[Annotated[float, Field(ge=0, le=100)]] = [0, 25, 50, 75, 100]
    distractors: Positive = 4
    seeds: Positive = 4
    task: Literal["single", "multivalue", "variable"] = "single"
    template: str = "plain"

    def content(self) -> str:
        return data.read_texts(self.text)

    def calls(self) -> list[Call]:
        arguments = {
            "--lengths": _list(self.lengths),
            "--depths": _list(self.depths),
            "--distractors": str(self.distractors),
            "--seeds": str(self.seeds),
            "--task": self.task,
            "--template": self.template,
        }
        flat = tuple(item for pair in arguments.items() for item in pair)
        groups = -(-len(self.depths) // (self.distractors + 1))
        return [((*self.text_arguments(), *flat), 2 * sum(self.lengths) * self.seeds * groups)]


class Timed(Task):
    """A task that takes time, in rounds with f16."""

    timed: ClassVar[bool] = True
    rounds: Positive = 3
    n_gen: Whole = 32
    n_prompt: Whole = 512

    def size_arguments(self) -> tuple[str, ...]:
        return "--rounds", str(self.rounds), "--n-gen", str(self.n_gen), "--n-prompt", str(self.n_prompt)


class Speed(Timed):
    name: ClassVar[str] = "speed"
    command: ClassVar[str] = "speed"
    depths: list[Whole] = [0, 2048]

    def calls(self) -> list[Call]:
        return [self._call(depth) for depth in sorted(self.depths)]

    def _call(self, depth: int) -> Call:
        tokens = 2 * self.rounds * (depth + 2 * self.n_prompt + self.n_gen)
        return ("--depth", str(depth), *self.size_arguments()), tokens


class Server(Timed):
    name: ClassVar[str] = "server"
    command: ClassVar[str] = "speed"
    parallel: list[Positive] = [1, 4]
    n_prompt: Positive = 256

    def calls(self) -> list[Call]:
        return [self._call(parallel) for parallel in sorted(self.parallel)]

    def _call(self, parallel: int) -> Call:
        n_requests = 3 * parallel * self.rounds  # three per slot and round
        tokens = 2 * n_requests * (self.n_prompt + self.n_gen)
        return ("--depth", "none", "--parallel", str(parallel), *self.size_arguments()), tokens


TASKS: dict[str, type[Task]] = {task.name: task for task in (Kld, Needle, Speed, Server)}


def _list(items: list[Any]) -> str:
    return ",".join(f"{item:g}" for item in items)


class Plan(Part):
    models: Models
    caches: Caches = DEFAULT_CACHES.split(",")
    threads: Whole = 0
    gpu_layers: Literal["all"] | Whole | None = None
    kld: Kld | None = None
    needle: Needle | None = None
    speed: Speed | None = None
    server: Server | None = None

    def tasks(self) -> list[Task]:
        return [task for task in (self.kld, self.needle, self.speed, self.server) if task]

    def models_of(self, task: Task) -> list[str]:
        return list(dict.fromkeys(task.models or self.models))

    def caches_of(self, task: Task) -> list[str]:
        """K/V, each once. Raises TurbokvError for unknown types."""
        return list(dict.fromkeys(map(str, cache_type.parse_pairs(",".join(task.caches or self.caches)))))


def load(file: Path | None, flags: dict[str, Any], tasks: list[str] | None = None, text: str | None = None) -> Plan:
    """The plan of a file with what the flags say instead; a flag for a task is a dict, and adds the task. With `tasks`
    these and no others are measured. `text` is that of all tasks on text. Raises TurbokvError that names what is wrong
    where."""
    content: dict[str, Any] = {}
    if file:
        try:
            content = tomllib.loads(file.read_text())
        except FileNotFoundError:
            raise TurbokvError(f"there is no plan at {file}") from None
        except (OSError, ValueError) as error:
            raise TurbokvError(f"cannot read {file}: {error}") from None
    for key, value in flags.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = content[key] | value
        else:
            content[key] = value
    if tasks is not None:
        if unknown := [task for task in tasks if task not in TASKS]:
            raise TurbokvError(f"unknown task '{unknown[0]}'. Known tasks: {', '.join(TASKS)}")
        content = {key: value for key, value in content.items() if key not in TASKS or key in tasks}
        content = {task: {} for task in tasks} | content
    if text is not None:
        on_text = [
            name for name, task in TASKS.items() if issubclass(task, OnText) and isinstance(content.get(name), dict)
        ]
        content |= {name: content[name] | {"text": text} for name in on_text}
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        where = f"{file}: " if file else ""
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise TurbokvError(f"{where}{found}. See `turbokv sweep --help`") from None
    if not plan.tasks():
        raise TurbokvError(f"nothing to measure: name tasks ({', '.join(TASKS)}) with --task or as tables of the plan")
    for task in plan.tasks():
        plan.caches_of(task)  # unknown types are named now
    return plan
