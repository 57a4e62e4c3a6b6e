"""Plans, and what is found in haystacks, for the tests of needles."""

from __future__ import annotations

import re
from typing import Any

from turbokv import prompt
from turbokv.engine import Model
from turbokv.haystack import Plan, Question, Task

PLAIN = prompt.parse("plain", prompt.PLAIN)


def plan_of(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "task": Task.SINGLE, "template": PLAIN, "lengths": (384,), "depths": (0.0, 0.5, 1.0), "seeds": (0,),
        "distractors": 3,
    }  # fmt: skip
    return Plan(**(usual | changes))


def plain(model: Model, *pieces: str) -> list[int]:
    """Tokens of the pieces, each tokenized by itself."""
    return [int(token) for piece in pieces for token in model.tokenize(piece, add_special=False)]


def places(whole: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part]


def name_of(question: Question) -> str:
    found = re.search(r"secret words? of( \w+ \w+)\?", question.text)
    assert found
    return found[1]
