"""How haystacks and prompts are built."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needles import name_of, places, plain, plan_of
from test_cli import check_refused, turbokv
from tiny_models import N_EMBD, N_FF, N_LAYER, N_VOCAB, TinyModel
from turbokv import data, haystack, prompt
from turbokv.engine import Model
from turbokv.errors import TurbokvError
from turbokv.haystack import Task, Tokens
from turbokv.prompt import Template


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with Model(data.MINI) as model:
        yield model


@pytest.fixture(scope="module")
def sample(mini: Model) -> Tokens:
    return mini.tokenize(data.read_text(None), add_special=False)


# --- haystacks


@pytest.mark.parametrize("seed", range(5))
def test_needles_are_what_the_models_were_trained_on(mini: Model, sample: Tokens, seed: int) -> None:
    """They were trained on pieces that are tokenized one by one."""
    (hay,) = haystack.haystacks(mini, sample, plan_of(seeds=(seed,)))
    for question in hay.questions:
        name, (word,) = name_of(question), question.right
        trained = plain(mini, "\nThe secret word of", name, " is", word, ".\n")
        assert len(places(hay.tokens.tolist(), trained)) == 1
        asked, tails = haystack.alternatives(mini, question.text, [word])
        assert asked.tolist() == plain(mini, "\nQuestion: what is the secret word of", name, "? Answer:")
        assert tails[0].tolist() == plain(mini, word)


@given(
    task=st.sampled_from(Task),
    seed=st.integers(0, 10_000),
    distractors=st.integers(1, 5),
    depths=st.sets(st.floats(0, 1), min_size=1, max_size=7),
    length=st.integers(900, 1500),
)
def test_every_depth_is_asked_once_and_every_prompt_fits(
    mini: Model, sample: Tokens, task: Task, seed: int, distractors: int, depths: set[float], length: int
) -> None:
    plan = plan_of(task=task, seeds=(seed,), distractors=distractors, depths=tuple(sorted(depths)), lengths=(length,))
    found = haystack.haystacks(mini, sample, plan)
    assert sorted(question.depth for hay in found for question in hay.questions) == sorted(depths)
    per_name = haystack.TASKS[task][1]
    for hay in found:
        assert hay.tokens[0] == mini.bos
        for question in hay.questions:
            assert len(question.right) == per_name
            assert len(question.wrong) == per_name * distractors
            words = [*question.right, *question.wrong]
            assert len({plain(mini, word)[0] for word in words}) == len(words)
            answered = mini.tokenize(question.text + ",".join(question.right), add_special=False)
            assert length - 40 <= len(hay.tokens) + len(answered) <= length


def test_needles_stand_at_their_depths(mini: Model, sample: Tokens) -> None:
    for hay in haystack.haystacks(mini, sample, plan_of(lengths=(2000,), seeds=(0, 1, 2))):
        for question in hay.questions:
            (place,) = places(hay.tokens.tolist(), plain(mini, f"\nThe secret word of{name_of(question)} is"))
            about = 1 + question.depth * (len(hay.tokens) - 1)
            assert -haystack.SNAP - 60 <= place - about <= 60  # the other needles take some 15 tokens each


def test_needles_stand_between_sentences(mini: Model) -> None:
    text = mini.tokenize("The cat sat on the mat. Was the dog by the door?\n" * 30, add_special=False)
    ends = plain(mini, ".", "\n", "?")
    for hay in haystack.haystacks(mini, text, plan_of(lengths=(1000,), depths=(0.3, 0.6), seeds=(0, 1, 2))):
        for question in hay.questions:
            (place,) = places(hay.tokens.tolist(), plain(mini, f"\nThe secret word of{name_of(question)} is"))
            assert int(hay.tokens[place - 1]) in ends


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_chain_of_variables_stands_in_its_order(mini: Model, sample: Tokens, depth: float) -> None:
    (hay,) = haystack.haystacks(mini, sample, plan_of(task=Task.VARIABLE, depths=(depth,), lengths=(900,)))
    (question,) = hay.questions
    tokens, (first, *rest) = hay.tokens.tolist(), question.right
    value = re.search(r"the value( \d+)", question.text)
    assert value
    chain = [f"\nVAR{first} ={value[1]}\n", *(f"\nVAR{b} = VAR{a}\n" for a, b in zip(question.right, rest))]  # noqa: B905
    found = [places(tokens, plain(mini, link)) for link in chain]
    assert [len(each) for each in found] == [1] * haystack.WORDS
    assert found == sorted(found)


def test_every_word_of_a_name_is_planted(mini: Model, sample: Tokens) -> None:
    (hay,) = haystack.haystacks(mini, sample, plan_of(task=Task.MULTIVALUE, lengths=(900,)))
    for question in hay.questions:
        for word in question.right:
            planted = plain(mini, f"\nOne of the secret words of{name_of(question)} is{word}.\n")
            assert len(places(hay.tokens.tolist(), planted)) == 1


def test_same_seed_gives_the_same_haystack_and_another_seed_another(mini: Model, sample: Tokens) -> None:
    a, b, c = (haystack.haystacks(mini, sample, plan_of(seeds=(seed,)))[0] for seed in (3, 3, 4))
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.questions == b.questions
    assert a.tokens.tolist() != c.tokens.tolist()
    assert {q.right for q in a.questions}.isdisjoint(q.right for q in c.questions)


def test_names_share_no_part_and_words_are_in_no_name(mini: Model) -> None:
    facts = haystack.draw_facts(mini, Task.SINGLE, 60, random.Random(1))
    parts = [part.lower() for fact in facts for part in fact.answer_prefix.split()[4:6]]
    assert len(set(parts)) == 120
    assert not {fact.words[0].strip() for fact in facts} & set(parts)


def test_haystack_that_is_too_short_is_refused_with_a_length_that_works(mini: Model, sample: Tokens) -> None:
    with pytest.raises(TurbokvError, match="--lengths of") as refusal:
        haystack.haystacks(mini, sample, plan_of(lengths=(100,)))
    (least,) = re.findall(r"--lengths of (\d+)", str(refusal.value))
    assert 100 < int(least) < 250
    plan = plan_of(lengths=(int(least) + 10,))  # another length draws other names
    assert len(haystack.haystacks(mini, sample, plan)) == 1


def test_more_distractors_than_names_are_refused(mini: Model) -> None:
    with pytest.raises(TurbokvError, match="fewer --distractors"):
        haystack.draw_facts(mini, Task.MULTIVALUE, 1000, random.Random(0))


def test_short_text_begins_again(mini: Model) -> None:
    text = mini.tokenize("One sentence. And another.\n", add_special=False)
    (hay,) = haystack.haystacks(mini, text, plan_of())
    assert len(places(hay.tokens.tolist(), text.tolist())) > 10


@pytest.mark.parametrize("model_path", [data.MINI, data.BIAS], ids=["mini", "bias"])
@given(text=st.text(max_size=20), answers=st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=4))
def test_question_and_answer_are_tokenized_as_one_text(model_path: Path, text: str, answers: list[str]) -> None:
    with Model(model_path) as model:
        before, tails = haystack.alternatives(model, "\n" + text, answers)
        for answer, tail in zip(answers, tails, strict=True):
            whole = model.tokenize("\n" + text + answer, add_special=False, parse_special=True)
            assert np.concatenate([before, tail]).tolist() == whole.tolist()


# --- templates


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{question}", "{haystack}"),
        ("{haystack} {haystack} {question}", "{haystack}"),
        ("{question} {haystack}", "{question}"),
        ("{haystack}", "{question}"),
        ("{haystack} {question} {answer_prefix} is", "{answer_prefix}"),
        ("{answer_prefix} {haystack} {question}", "{answer_prefix}"),
    ],
)
def test_template_that_cannot_work_is_refused(text: str, word: str) -> None:
    with pytest.raises(TurbokvError, match=re.escape(word)):
        prompt.parse("mine.txt", text)


def test_template_of_a_file_has_its_name_and_loses_its_last_line_break(mini: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text('{"text": {haystack}}\nQ: {question}\nA: {answer_prefix}\n')
    found = prompt.template(str(path), mini)
    assert found == Template("mine.txt", '{"text": ', "}\nQ: {question}\nA: {answer_prefix}")
    assert found.behind("who?", "It is") == "}\nQ: who?\nA: It is"


CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_chat_template(path: Path, template: str) -> Path:
    """A random llama model with this chat template."""
    model = TinyModel(path, "llama", head_dim=64, n_head=4, n_head_kv=2)
    model.header.add_rope_dimension_count(64)
    model.header.add_chat_template(template)
    model.matrix("token_embd", N_VOCAB, N_EMBD)
    model.norm("output_norm", N_EMBD)
    for i in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            model.norm(f"blk.{i}.{norm}", N_EMBD)
        shapes = {
            "attn_q": (256, N_EMBD),
            "attn_k": (128, N_EMBD),
            "attn_v": (128, N_EMBD),
            "attn_output": (N_EMBD, 256),
        }
        shapes |= {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
        for name, shape in shapes.items():
            model.matrix(f"blk.{i}.{name}", *shape)
    return model.save()


def test_chat_template_is_rendered_around_the_text_without_a_second_bos(tmp_path: Path) -> None:
    with Model(with_chat_template(tmp_path / "chat.gguf", CHATML)) as model:
        found = prompt.template("chat", model)
        assert found.before.startswith("<|im_start|>user\n")  # BOS comes in front of every prompt
        assert found.after.endswith("{question}<|im_end|>\n<|im_start|>assistant\n{answer_prefix}")
        text = model.tokenize(data.read_text(None)[:20000], add_special=False)
        (hay,) = haystack.haystacks(model, text, plan_of(template=found, lengths=(1200,)))
        assert places(hay.tokens.tolist(), [0]) == [0]
        assert hay.questions[0].text.endswith(f"assistant\nThe secret word of{name_of(hay.questions[0])} is")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no user turns') }}", "{% if %}", "{{ messages[0].__class__.__mro__[1].x() }}"]
)
def test_chat_template_that_fails_is_refused(tmp_path: Path, template: str) -> None:
    with (
        Model(with_chat_template(tmp_path / "chat.gguf", template)) as model,
        pytest.raises(TurbokvError, match=r"chat template of chat\.gguf cannot be rendered"),
    ):
        prompt.template("chat", model)


def test_model_without_chat_template_is_refused() -> None:
    check_refused(turbokv("needle", "--template", "chat"), "mini-q8_0.gguf has no chat template", "--template plain")
