"""Answers against brute force and greedy decoding, whole runs, intervals, and the command."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from needles import plain, plan_of
from numpy.typing import NDArray
from test_cli import check_refused, interrupted, strict_json, turbokv
from tiny_models import write_llama
from turbokv import data, haystack, native, needle
from turbokv.cache_type import F16, parse_pairs
from turbokv.engine import Context, Model
from turbokv.haystack import Haystack, Plan, Question, Task, Tokens
from turbokv.needle import Answer, Measurement
from turbokv.record import NeedleResult, Text
from turbokv.stats import cluster_bootstrap_ci95


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with Model(data.MINI) as model:
        yield model


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
    """Also where the memory cannot be cut back, and the haystack is decoded again. Batches of
    1, 7, 64 and 512 tokens round differently: the margins of these passes differ by 0.2 among themselves."""
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
        assert own.margin == pytest.approx(right - max(wrong), abs=0.5)
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
    check_refused(run, "turbo3", "head_dim 80", status=3)


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
