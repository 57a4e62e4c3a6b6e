"""Needles: how haystacks are built, answers against brute force and greedy decoding, and the command."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_cli import check_refused, interrupted, strict_json, turbokv
from tiny_models import N_EMBD, N_FF, N_LAYER, N_VOCAB, TinyModel, write_llama
from turbokv import data, haystack, native, needle, prompt
from turbokv.cache_type import parse_pairs
from turbokv.engine import Context, Model
from turbokv.errors import TurbokvError
from turbokv.haystack import Haystack, Plan, Question, Task, Tokens
from turbokv.needle import Answer, Measurement
from turbokv.perplexity import F16
from turbokv.prompt import Template
from turbokv.record import NeedleResult, Text
from turbokv.stats import cluster_bootstrap_ci95

PLAIN = prompt.parse("plain", prompt.PLAIN)


def plan_of(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "task": Task.SINGLE, "template": PLAIN, "lengths": (384,), "depths": (0.0, 0.5, 1.0), "seeds": (0,),
        "distractors": 3,
    }  # fmt: skip
    return Plan(**(usual | changes))


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with Model(data.MINI) as model:
        yield model


@pytest.fixture(scope="module")
def sample(mini: Model) -> Tokens:
    return mini.tokenize(data.read_text(None), add_special=False)


def plain(model: Model, *pieces: str) -> list[int]:
    """Tokens of the pieces, each tokenized by itself."""
    return [int(token) for piece in pieces for token in model.tokenize(piece, add_special=False)]


def places(whole: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part]


def name_of(question: Question) -> str:
    found = re.search(r"secret words? of( \w+ \w+)\?", question.text)
    assert found
    return found[1]


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


# --- answers by hand: a model whose tokens are characters


class Script:
    """As needle._Reader, of a model that wants to write `continuation` behind `prompt`; each of its tokens is e^3 times
    as likely as any other."""

    def __init__(self, prompt: str, continuation: str, poison: float | None = None) -> None:
        self.whole, self.poison = prompt + continuation, poison

    def logits(self, before: Tokens, tokens: Tokens, n_logits: int) -> NDArray[np.float64]:
        rows = []
        for n in range(len(before) + len(tokens) - n_logits + 1, len(before) + len(tokens) + 1):
            row = np.full(128, -5.0)
            row[ord(self.whole[n]) if n < len(self.whole) else 0] = -2.0
            if self.poison is not None:
                row[7] = self.poison
            rows.append(row)
        return np.array(rows)


CHARACTERS = cast(Model, SimpleNamespace(tokenize=lambda text, **_: np.array([ord(c) for c in text], np.int32)))


def answer(continuation: str, right: tuple[str, ...], wrong: tuple[str, ...], poison: float | None = None) -> Answer:
    reader = cast(Any, Script("Q:", continuation, poison))
    return needle.ask(reader, CHARACTERS, Question(0.5, "Q:", right, wrong))


@pytest.mark.parametrize(
    ("continuation", "right", "margin"),
    [
        ("red", True, 9.0),  # three tokens of -2 against three of -5
        ("blu", False, -9.0),
        ("rot", False, 3.0),  # leads by its first token, but greedy decoding would not write it
        ("xyz", False, 0.0),
    ],
)
def test_answer_is_right_when_greedy_decoding_gives_it(continuation: str, right: bool, margin: float) -> None:
    assert answer(continuation, ("red",), ("blu", "tan")) == Answer(right, margin)


@pytest.mark.parametrize(
    ("continuation", "right"),
    [("red,tan,", True), ("tan,red,", True), ("red,red,", False), ("red,blu,", False), ("blu,red,", False)],
)
def test_several_words_may_come_in_any_order_but_only_once(continuation: str, right: bool) -> None:
    assert answer(continuation, ("red", "tan"), ("blu",)).right == right


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_logits_that_are_not_finite_give_no_right_answer_and_no_margin(poison: float) -> None:
    found = answer("red", ("red",), ("blu",), poison)
    assert not found.right
    assert np.isnan(found.margin)


# --- whole runs

BRUTE: dict[str, Any] = {"lengths": (300,), "depths": (0.0, 1.0), "distractors": 2, "seeds": (5,)}


def measured(model: Model, caches: str, plan: Plan, **changes: Any) -> Measurement:
    text = model.tokenize(data.read_text(None), add_special=False)
    arguments: dict[str, Any] = {"n_threads": 2} | changes
    return needle.measure(model, haystack.haystacks(model, text, plan), parse_pairs(caches), **arguments)


def results(model: Model, caches: str, plan: Plan, **changes: Any) -> list[NeedleResult]:
    return needle.results(measured(model, caches, plan, **changes), plan, model, Text(name="sample", sha256="0"))


def from_scratch(model: Model, hay: Haystack, question: Question, answer: str) -> tuple[float, bool]:
    """Log-probability of the answer, and whether it is what greedy decoding writes: every token by a pass over all."""
    prompt_tokens = [*hay.tokens.tolist(), *plain(model, question.text)]
    log_p, greedy = 0.0, True
    with Context(model, F16, 512, 2) as context:
        for token in plain(model, answer):
            tokens = np.array(prompt_tokens, np.int32)
            (logits,) = (row[0].astype(np.float64) for row in context.logits(tokens, len(tokens) - 1))
            log_p += logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            greedy &= int(logits.argmax()) == token
            prompt_tokens.append(token)
    return log_p, greedy


@pytest.mark.parametrize("can_cut", [True, False])
def test_margins_are_those_of_passes_over_the_whole_prompt(
    mini: Model, can_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the memory cannot be cut back, and the haystack is decoded again. Other batches round differently,
    which moved margins of about 10 by 0.06."""
    if not can_cut:
        cut = Context.cut
        monkeypatch.setattr(Context, "cut", lambda self, position: position == 0 and cut(self, 0))
    found = measured(mini, "f16", plan_of(**BRUTE))
    assert found.again == (not can_cut)
    (hay,) = found.haystacks
    n_tokens = []
    for question, own in zip(hay.questions, found.reference.answers[0], strict=True):
        right, greedy = from_scratch(mini, hay, question, question.right[0])
        wrong = [from_scratch(mini, hay, question, word)[0] for word in question.wrong]
        assert own.margin == pytest.approx(right - max(wrong), abs=0.15)
        assert own.right == greedy
        n_tokens += [len(plain(mini, word)) for word in (*question.right, *question.wrong)]
    assert max(n_tokens) > 1  # words of several tokens are among them


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of all architectures, by upstream's own test."""
    folder = tmp_path_factory.mktemp("architectures")
    subprocess.run([native.tool("test-llama-archs"), "-o", folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["gemma3-dense", "mamba-dense", "falcon-h1-dense", "qwen3next-moe"])
def test_memory_says_truly_whether_it_can_be_cut(name: str, architectures: Path) -> None:
    """A sliding window that let go of what the cut needs, or a recurrent state, must not be taken for a haystack."""
    random_tokens = np.random.default_rng(0).integers(1, 100, 600).astype(np.int32)
    with Model(architectures / f"{name}.gguf") as model, Context(model, F16, 1024, 2) as context:
        for kept in (16, 64, 500):
            assert context.cut(0)
            context.append(random_tokens, 0, 0)
            if not context.cut(kept):
                continue
            cut = context.append(random_tokens[kept : kept + 8], kept, 1)
            assert context.cut(0)
            whole = context.append(random_tokens[: kept + 8], 0, 1)
            np.testing.assert_allclose(cut, whole, atol=0.02 * np.abs(whole).max())


def test_f16_beside_the_reference_differs_in_nothing_and_two_bits_cost_margin(mini: Model) -> None:
    plan = plan_of(seeds=tuple(range(8)), depths=(0.0, 0.33, 0.66, 1.0))
    f16, turbo2 = results(mini, "f16,turbo2", plan)
    assert f16.margin_delta.mean == 0
    assert f16.margin_delta.ci95 == (0, 0)
    assert (f16.lost, f16.gained, f16.non_finite) == (0, 0, 0)
    assert f16.accuracy.mean == f16.accuracy_f16 == turbo2.accuracy_f16
    assert f16.accuracy_f16 >= 0.9
    assert turbo2.margin_delta.ci95
    assert turbo2.margin_delta.ci95[1] < 0
    assert turbo2.margin_delta.mean == pytest.approx(cast(float, turbo2.margin.mean) - cast(float, turbo2.margin_f16))


def test_one_cache_under_two_names_gives_the_same_record() -> None:
    with Model(data.BIAS) as model:
        a, b = (r.model_dump() for r in results(model, "turbo3,turbo3_64", plan_of(seeds=(0, 1))))
    for record in (a, b):
        record.pop("seconds")
        record.pop("requested")
    assert a == b


def test_cells_and_totals_are_those_of_the_trials(mini: Model) -> None:
    (turbo2,) = results(mini, "turbo2", plan_of(seeds=(0, 1), lengths=(300, 400)))
    assert [(cell.length, cell.depth) for cell in turbo2.cells] == [(n, d) for n in (300, 400) for d in (0, 0.5, 1)]
    assert len(turbo2.trials) == 12
    assert turbo2.haystacks == len({trial.haystack for trial in turbo2.trials}) == 4
    for cell in turbo2.cells:
        inside = [t for t in turbo2.trials if (t.length, t.depth) == (cell.length, cell.depth)]
        assert cell.trials == len(inside) == 2
        assert cell.accuracy == np.mean([t.right for t in inside])
        deltas = [cast(float, t.margin) - cast(float, t.margin_f16) for t in inside]
        assert cell.margin_delta == pytest.approx(np.mean(deltas))
    assert turbo2.lost == sum(t.right_f16 and not t.right for t in turbo2.trials)
    assert turbo2.accuracy.mean == np.mean([t.right for t in turbo2.trials])


@pytest.mark.parametrize("task", [Task.MULTIVALUE, Task.VARIABLE])
def test_other_tasks_run(mini: Model, task: Task) -> None:
    (q8_0,) = results(mini, "q8_0", plan_of(task=task, lengths=(900,), depths=(0.5,)))
    assert q8_0.words == haystack.WORDS
    assert q8_0.trials[0].margin is not None


def test_trial_without_a_margin_is_counted_and_in_no_mean(mini: Model) -> None:
    plan = plan_of(seeds=(0, 1))
    found = measured(mini, "q8_0", plan)
    found.runs[0].answers[0][0] = Answer(False, float("nan"))
    (record,) = needle.results(found, plan, mini, Text(name="sample", sha256="0"))
    assert record.non_finite == 1
    assert record.trials[0].margin is None
    deltas = [cast(float, t.margin) - cast(float, t.margin_f16) for t in record.trials[1:]]
    assert record.margin_delta.mean == pytest.approx(np.mean(deltas))


@pytest.mark.parametrize(("passes", "finished"), [(2, 1), (3, 1), (5, 2)])
def test_interrupted_run_has_the_haystacks_that_all_caches_finished(mini: Model, passes: int, finished: int) -> None:
    """Two passes a haystack: the reference and q8_0."""
    plan = plan_of(seeds=(0, 1, 2), depths=(0.5,), lengths=(256,))
    done = iter(range(1, 100))

    def advance(_: str) -> None:
        if next(done) == passes:
            raise KeyboardInterrupt

    (whole,) = results(mini, "q8_0", plan)
    (cut,) = results(mini, "q8_0", plan, advance=advance)
    assert cut.haystacks == finished
    assert cut.trials == whole.trials[:finished]


def test_interruption_before_the_first_haystack_ends_the_run(mini: Model) -> None:
    def advance(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(mini, "q8_0", plan_of(), advance=advance)


def test_cache_that_the_model_does_not_take_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "head_dim_80.gguf", 80)
    run = turbokv("needle", "-m", model, "--lengths", "1024", "--cache", "f16,turbo3")
    check_refused(run, "turbo3", "head_dim 80")


# --- intervals


def test_cluster_interval_covers_the_true_mean() -> None:
    """Values of a cluster share a part that is as large as their own; 12 clusters of 3 to 5 values."""
    random_numbers = np.random.default_rng(8)
    covered = 0
    for _ in range(400):
        clusters = []
        for _ in range(12):
            size = random_numbers.integers(3, 6)
            clusters.append(random_numbers.standard_normal() + random_numbers.standard_normal(size))
        low, high = cluster_bootstrap_ci95(clusters)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_cluster_interval_is_that_of_whole_clusters() -> None:
    """Ten equal values say no more than one."""
    values = np.random.default_rng(9).standard_normal(8)
    once = cluster_bootstrap_ci95([np.array([value]) for value in values])
    assert cluster_bootstrap_ci95([np.full(10, value) for value in values]) == pytest.approx(once)


@pytest.mark.parametrize("clusters", [[], [np.ones(5)], [np.ones(5), np.ones(0)]], ids=["none", "one", "one-empty"])
def test_less_than_two_clusters_give_nan(clusters: list[NDArray[np.float64]]) -> None:
    assert np.isnan(cluster_bootstrap_ci95(clusters)).all()


# --- the command

SHORT = ("needle", "--lengths", "256,384", "--depths", "0,100", "--seeds", "2", "--distractors", "2")


def test_results_fit_the_schema_and_are_the_same_again(tmp_path: Path) -> None:
    contents = []
    for i in range(2):
        path = tmp_path / f"{i}.json"
        run = turbokv(*SHORT, "--cache", "f16,turbo4/turbo3", "--json", path)
        assert run.returncode == 0, run.stderr
        assert [NeedleResult.model_validate(record).cache for record in strict_json(path)] == [
            "f16/f16",
            "turbo4/turbo3",
        ]
        contents.append((re.sub(r'"seconds": [\d.]+', "", path.read_text()), run.stdout))
    assert contents[0] == contents[1]


def test_table_and_map_have_the_numbers_of_the_json(tmp_path: Path) -> None:
    path = tmp_path / "needle.json"
    run = turbokv(*SHORT, "--seed", "7", "--cache", "turbo2", "--json", path, COLUMNS="80")
    (record,) = strict_json(path)
    low, high = record["margin_delta"]["ci95"]
    for number in (
        f"{record['margin']['mean']:.3f}",
        f"{low:+.3f}..{high:+.3f}",
        f"{100 * record['accuracy_f16']:.1f} %",
    ):
        assert number in run.stdout
    for cell in record["cells"]:
        assert f"{100 * cell['accuracy']:.0f}  {cell['margin_delta']:+6.2f}" in run.stdout
    assert {trial["seed"] for trial in record["trials"]} == {7, 8}
    assert record["text"]["name"] == "sample.txt"
    assert "…" not in run.stdout


def test_note_says_that_a_task_is_too_hard(tmp_path: Path) -> None:
    run = turbokv(
        "needle", "--task", "variable", "--lengths", "700", "--seeds", "1", "--depths", "50", "--cache", "q8_0"
    )
    assert run.returncode == 0
    assert "f16 itself is right in only 0 %" in run.stderr


def test_folder_of_texts_is_the_haystack(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second.\n"), ("a.txt", "First.\n"), ("c.md", "None of it.\n")):
        (tmp_path / name).write_text(text)
    assert data.read_texts(str(tmp_path)) == "First.\n\nSecond.\n"
    path = tmp_path / "needle.json"
    run = turbokv(*SHORT, "--cache", "q8_0", "-f", tmp_path, "--json", path)
    assert run.returncode == 0, run.stderr
    assert "is repeated in haystacks of 384" in run.stderr
    assert strict_json(path)[0]["text"]["name"] == tmp_path.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "512,many"], ["--lengths 512,many"]),
        (["--lengths", "0"], ["--lengths 0"]),
        (["--lengths", "60"], ["of 60 tokens", "--lengths of"]),
        (["--depths", "0,101"], ["--depths 0,101"]),
        (["--depths", "nan"], ["--depths nan"]),
        (["--depths", ""], ["--depths"]),
        (["--template", "absent.txt"], ["absent.txt", "plain"]),
        (["--cache", "turbo9"], ["'turbo9'"]),
        (["-f", "/nonexistent/text.txt"], ["/nonexistent/text.txt"]),
        (["-f", "/dev/null"], ["empty"]),
        (["--json", "/proc/needle.json"], ["/proc/needle.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_impossible_request_is_refused(arguments: list[str], words: list[str]) -> None:
    check_refused(turbokv("needle", *arguments), *words)


def test_folder_without_texts_is_refused(tmp_path: Path) -> None:
    check_refused(turbokv("needle", "-f", tmp_path), str(tmp_path), ".txt")


def test_ctrl_c_keeps_the_finished_haystacks(tmp_path: Path) -> None:
    path = tmp_path / "needle.json"
    run = interrupted("[4/80]", "needle", "--lengths", "512", "--seeds", "40", "--cache", "q8_0", "--json", path)
    assert run.returncode == 130
    (record,) = strict_json(path)
    assert 2 <= record["haystacks"] < 40
    assert f"{record['haystacks']} of 40 haystacks" in run.stderr
    assert "q8_0/q8_0" in run.stdout


def test_ctrl_c_before_the_first_haystack_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "needle.json"
    run = interrupted("[1/", "needle", "--lengths", "2048", "--cache", "turbo3", "--json", path)
    assert run.returncode == 130
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_and_shows_an_example() -> None:
    run = turbokv("needle", "-h")
    words = ["How to read it", "margin", "distractors", "multivalue", "fail the other two", "Example: turbokv needle"]
    assert [word for word in words if word not in " ".join(run.stdout.split())] == []
