"""Prompts that ask a question about a long text: what stands before the text, and between it and the answer.

A template is a text with the placeholders {haystack}, {question} and {answer_prefix}. The question stands behind the
haystack, so that one pass over the haystack serves many questions, and the answer follows right behind the template.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from turbokv import data
from turbokv.engine import Model
from turbokv.errors import TurbokvError

PLAIN = "{haystack}\nQuestion: {question} Answer:"  # what the built-in models were trained on
CHAT_MESSAGE = "Remember the facts that are hidden in this text.\n\n{haystack}\n\nQuestion: {question}"
PLACEHOLDERS = ("{haystack}", "{question}", "{answer_prefix}")
TODAY = datetime(2026, 1, 1)  # for chat templates that write the date: the same prompt on every day


@dataclass(frozen=True)
class Template:
    """`name` is plain, chat, or a file's; `before` and `after` are what surrounds the haystack."""

    name: str
    before: str
    after: str

    def behind(self, question: str, answer_prefix: str) -> str:
        """What is decoded behind the haystack, up to the answer."""
        return self.after.replace("{answer_prefix}", answer_prefix).replace("{question}", question)


def parse(name: str, text: str) -> Template:
    """A template from its text, whose last white space is dropped. Raises TurbokvError for one that cannot work."""
    text = text.rstrip()
    before, found, after = text.partition("{haystack}")
    if not found or "{haystack}" in after:
        raise TurbokvError(f"the template {name} must have {{haystack}} once, where the text goes")
    if "{question}" not in after or "{question}" in before:
        raise TurbokvError(f"the template {name} must have {{question}} behind {{haystack}}, and not before it")
    if "{answer_prefix}" in text.removesuffix("{answer_prefix}"):
        raise TurbokvError(f"the template {name} goes on behind {{answer_prefix}}: the answer comes there, end with it")
    return Template(name, before, after)


def template(argument: str, model: Model) -> Template:
    """The template for a --template argument: plain, chat, or a file."""
    if argument == "plain":
        return parse("plain", PLAIN)
    if argument == "chat":
        return chat(model)
    path = Path(argument)
    if not path.exists():
        raise TurbokvError(
            f"there is no template at {path}: give plain, chat, or a file with {', '.join(PLACEHOLDERS)}"
        )
    return parse(path.name, data.read_text(argument))


def chat(model: Model) -> Template:
    """The model's own chat template: question and haystack are the user's turn, the assistant's begins with the answer
    prefix. Raises TurbokvError if the model has none, or one that fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source, name = model.chat_template(), model.path.name
    if source is None:
        raise TurbokvError(
            f"{name} has no chat template: use --template plain, or a file with {', '.join(PLACEHOLDERS)}"
        )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    specials = model.special_texts()
    try:
        text = environment.from_string(source).render(
            messages=[{"role": "user", "content": CHAT_MESSAGE}],
            add_generation_prompt=True,
            enable_thinking=False,  # of templates that know it: the answer, not thoughts, comes next
            **specials,
        )
    except Exception as error:  # the template is a program of somebody else's: it may raise anything
        raise TurbokvError(
            f"the chat template of {name} cannot be rendered: {error}. Use --template plain, or a file"
        ) from error
    if model.bos is not None and specials["bos_token"]:
        text = text.removeprefix(specials["bos_token"])  # the model's BOS goes in front of every prompt
    return parse("chat", text + "{answer_prefix}")
