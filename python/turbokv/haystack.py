"""Haystacks: long texts in which facts about some names are planted, and the questions about them.

A fact says which words belong to a name. One haystack serves several questions: a fact is planted at every depth that
is asked about, more at random depths until there are `distractors` + 1, and for each question the words of all other
facts are the wrong answers. Everything random is drawn from the length and the seed, the same in every run.

Three tasks, in the style of RULER (Hsieh et al. 2024, arXiv:2404.06654):
  single      one word for every name, its multi-key needle
  multivalue  several words for every name, in as many places; all are asked for
  variable    chains of assignments; all variables that hold a value are asked for
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from turbokv import data
from turbokv.engine import Model
from turbokv.errors import TurbokvError
from turbokv.prompt import Template


class Task(StrEnum):
    SINGLE = "single"
    MULTIVALUE = "multivalue"
    VARIABLE = "variable"


Tokens = NDArray[np.int32]

WORDS = 4  # words per name in the tasks that ask for several
SNAP = 64  # tokens that a needle moves towards the start at most, to the end of a line or sentence
MIN_TEXT = 64  # tokens of text in the shortest haystack
ENDS = ("\n", "\n\n", ".", ".\n", ".\n\n", "!", "?")  # of a line or sentence


@dataclass(frozen=True)
class Fact:
    """What is planted about one name, and how it is asked for. Words and names begin with their space."""

    sentences: tuple[str, ...]  # in the order in which they stand in the text
    question: str
    answer_prefix: str  # how an answer in a sentence begins
    words: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    depth: float  # of the first sentence, 0 to 1
    text: str  # decoded behind the haystack, up to the answer
    right: tuple[str, ...]  # all are asked for, in any order
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Haystack:
    length: int  # tokens with the longest question and its answer
    seed: int
    tokens: Tokens  # with BOS, needles, and what the template has in front
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Plan:
    """What is asked: every depth (0 to 1) at every length (tokens), with every seed."""

    task: Task
    template: Template
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: tuple[int, ...]
    distractors: int


def single(name: str, words: tuple[str, ...], _: int) -> Fact:
    return Fact(
        (f"\nThe secret word of{name} is{words[0]}.\n",),
        f"what is the secret word of{name}?",
        f"The secret word of{name} is",
        words,
    )


def multivalue(name: str, words: tuple[str, ...], _: int) -> Fact:
    return Fact(
        tuple(f"\nOne of the secret words of{name} is{word}.\n" for word in words),
        f"what are the {len(words)} secret words of{name}?",
        f"The {len(words)} secret words of{name} are",
        words,
    )


def variable(_: str, words: tuple[str, ...], value: int) -> Fact:
    links = zip(words[1:], words[:-1], strict=True)
    return Fact(
        (f"\nVAR{words[0]} = {value}\n", *(f"\nVAR{word} = VAR{held}\n" for word, held in links)),
        f"which {len(words)} variables have the value {value}?",
        f"The {len(words)} variables with the value {value} are",
        words,
    )


TASKS: dict[Task, tuple[Callable[[str, tuple[str, ...], int], Fact], int]] = {
    Task.SINGLE: (single, 1),
    Task.MULTIVALUE: (multivalue, WORDS),
    Task.VARIABLE: (variable, WORDS),
}


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Names of two words and words, each with a space in front."""
    content = json.loads(data.NEEDLE_WORDS.read_text())
    return content["names"], [f" {word}" for word in content["values"]]


def draw_facts(model: Model, task: Task, n: int, draw: random.Random) -> list[Fact]:
    """n facts. No two names share a part, no word is part of a name, and all words differ in their first token: the
    logits of one position tell them apart, and none is the beginning of another."""
    form, per_name = TASKS[task]
    all_names, all_words = vocabulary()
    names: list[str] = []
    parts: set[str] = set()
    for name in draw.sample(all_names, len(all_names)):
        if len(names) < n and parts.isdisjoint(name.lower().split()):
            names.append(name)
            parts.update(name.lower().split())
    words: dict[int, str] = {}  # by first token
    for word in draw.sample(all_words, len(all_words)):
        if len(words) == n * per_name:
            break
        if word.strip() not in parts:
            words.setdefault(int(model.tokenize(word, add_special=False)[0]), word)
    if len(names) < n or len(words) < n * per_name:
        raise TurbokvError(f"there are not enough names and words for {n} facts: use fewer --distractors")
    chosen = tuple(words.values())
    values = draw.sample(range(10_000, 100_000), n)
    return [form(names[i], chosen[i * per_name : (i + 1) * per_name], values[i]) for i in range(n)]


def haystacks(model: Model, text: Tokens, plan: Plan) -> list[Haystack]:
    """All haystacks of a plan, seed by seed, so that a run that is cut short has all lengths and depths."""
    n_groups = -(-len(plan.depths) // (plan.distractors + 1))
    return [
        build(model, text, plan, length, seed, plan.depths[group::n_groups])
        for seed in plan.seeds
        for length in plan.lengths
        for group in range(n_groups)
    ]


def build(model: Model, text: Tokens, plan: Plan, length: int, seed: int, depths: tuple[float, ...]) -> Haystack:
    """One haystack with a fact for each of the depths. `text` is tokenized without BOS and begins again at its end.
    Raises TurbokvError if `length` is too short for the facts and a question."""
    draw = random.Random(f"{plan.task} {length} {seed} {depths}")
    facts = draw_facts(model, plan.task, plan.distractors + 1, draw)
    offset = draw.randrange(len(text))

    head = model.tokenize(plan.template.before, add_special=False, parse_special=True)
    if model.bos is not None:
        head = np.concatenate([np.array([model.bos], np.int32), head])
    needles = [[model.tokenize(sentence, add_special=False) for sentence in fact.sentences] for fact in facts]
    behind = [plan.template.behind(fact.question, fact.answer_prefix) for fact in facts]
    longest = max(
        len(model.tokenize(question + ",".join(fact.words), add_special=False, parse_special=True))
        for question, fact in zip(behind, facts, strict=True)
    )
    fixed = len(head) + sum(len(tokens) for fact in needles for tokens in fact) + longest + 1
    room = length - fixed
    if room < MIN_TEXT:
        raise TurbokvError(
            f"needles and question take {fixed} of {length} tokens: use --lengths of {fixed + MIN_TEXT} or more, or "
            "fewer --distractors"
        )

    hay = np.take(text, range(offset, offset + room), mode="wrap")
    ends = _ends(model, hay)
    planted: list[tuple[int, Tokens]] = []
    for i, sentences in enumerate(needles):
        first = depths[i] if i < len(depths) else draw.random()
        rest = [draw.random() for _ in sentences[1:]]
        if plan.task == Task.VARIABLE:  # a chain is followed forwards
            rest = sorted(first + (1 - first) * later for later in rest)
        for depth, tokens in zip((first, *rest), sentences, strict=True):
            planted.append((_snapped(depth, room, ends), tokens))
    planted.sort(key=lambda needle: needle[0])  # stable: a chain keeps its order where two meet

    pieces, start = [head], 0
    for position, tokens in planted:
        pieces += [hay[start:position], tokens]
        start = position
    pieces.append(hay[start:])
    questions = []
    for i, depth in enumerate(depths):
        wrong = tuple(word for fact in facts if fact is not facts[i] for word in fact.words)
        questions.append(Question(depth, behind[i], facts[i].words, wrong))
    return Haystack(length, seed, np.concatenate(pieces), tuple(questions))


def _ends(model: Model, hay: Tokens) -> Tokens:
    """Positions behind the end of a line or sentence, ascending."""
    tokens = [int(model.tokenize(end, add_special=False)[-1]) for end in ENDS]
    found: Tokens = (np.flatnonzero(np.isin(hay, tokens)) + 1).astype(np.int32)
    return found


def _snapped(depth: float, room: int, ends: Tokens) -> int:
    """The position for a depth: the end of a line or sentence at most SNAP tokens before it, or itself."""
    position = round(depth * room)
    if position == room:
        return room
    before = ends[: np.searchsorted(ends, position, side="right")]
    return int(before[-1]) if len(before) and position - before[-1] <= SNAP else position


def alternatives(model: Model, text: str, answers: list[str]) -> tuple[Tokens, list[Tokens]]:
    """Tokens of `text`, and of every answer behind it. They are tokenized together, as a text would be; what depends
    on the answer is counted to it."""
    texts = [text, *(text + answer for answer in answers)]
    tokens = [model.tokenize(each, add_special=False, parse_special=True) for each in texts]
    shared = min(_common(tokens[0], each) for each in tokens[1:])
    return tokens[0][:shared], [each[shared:] for each in tokens[1:]]


def _common(a: Tokens, b: Tokens) -> int:
    """Tokens that two begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
