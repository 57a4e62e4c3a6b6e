"""The command `turbokv` as users run it: its results, its refusals, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from turbokv import __version__, data, spec

COMMAND = str(Path(sys.executable).with_name("turbokv"))
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1"}
SUBCOMMANDS = (
    "kld", "ppl", "needle", "speed", "sweep", "results", "report", "recommend", "types", "doctor", "serve", "testbed",
)  # fmt: skip

Run = subprocess.CompletedProcess[str]


def turbokv(*arguments: str | Path, before: Callable[[], object] | None = None, **environment: str) -> Run:
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT | environment,
        preexec_fn=before,
    )


@pytest.fixture(scope="module", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reference windows go there, not into the user's cache."""
    ENVIRONMENT["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def check_refused(run: Run, *words: str, status: int = 1) -> None:
    """One line that says what is wrong, nothing measured."""
    assert run.returncode == status
    assert run.stdout == ""
    assert run.stderr.startswith("turbokv: ")
    assert len(run.stderr.splitlines()) == 1
    assert [word for word in words if word not in run.stderr] == []


def strict_json(path: Path) -> Any:
    """As json.load, but NaN and Infinity, which JSON does not have, are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path.name}")

    return json.loads(path.read_text(), parse_constant=refuse)


# --- refusals


@pytest.fixture
def text(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("turbo9", ["'turbo9'", "turbo3", "q8_0"]),
        ("f16,TURBO3", ["'TURBO3'"]),
        ("turbo3/turbo9", ["'turbo9'"]),
        ("f16/f16/f16", ["'f16/f16/f16'", "K/V"]),
        ("turbo3/", ["'turbo3/'", "K/V"]),
        ("", ["K/V"]),
    ],
)
def test_unknown_cache_is_refused(cache: str, words: list[str]) -> None:
    check_refused(turbokv("kld", "--cache", cache), *words)


@pytest.mark.parametrize("command", ["kld", "ppl", "serve"])
def test_missing_model_is_refused(command: str, tmp_path: Path) -> None:
    check_refused(turbokv(command, "-m", tmp_path / "absent.gguf"), "no model at", str(tmp_path / "absent.gguf"))


def test_truncated_model_is_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(data.MINI.read_bytes()[: data.MINI.stat().st_size // 2])
    check_refused(turbokv("kld", "-m", half), str(half), "incomplete")


@pytest.mark.parametrize("content", [b"", b"This is no model.\n" * 100], ids=["empty", "text"])
def test_file_that_is_no_gguf_is_refused(text: Callable[[bytes], Path], content: bytes) -> None:
    path = text(content)
    check_refused(turbokv("kld", "-m", path), str(path), "GGUF")


def test_text_below_one_context_is_refused(text: Callable[[bytes], Path]) -> None:
    run = turbokv("kld", "-f", text(b"Once upon a time there was a short text.\n"), "-c", "512")
    check_refused(run, "512")
    assert re.search(r"the text has \d\d tokens", run.stderr)


def test_text_that_is_not_utf8_is_refused(text: Callable[[bytes], Path]) -> None:
    path = text(b"caf\xe9 " * 5000)
    check_refused(turbokv("kld", "-f", path), str(path), "UTF-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "/nonexistent/text.txt"], ["/nonexistent/text.txt"]),
        (["--chunks", "0"], ["--chunks 0", "-1"]),
        (["--chunks", "-2"], ["--chunks -2", "-1"]),
        (["-c", "0"], ["context of 0 tokens", "-c"]),
    ],
    ids=" ".join,
)
def test_impossible_request_is_refused(arguments: list[str], words: list[str]) -> None:
    check_refused(turbokv("kld", *arguments), *words)


def test_doctor_looks_at_one_thing_at_a_time(tmp_path: Path) -> None:
    check_refused(turbokv("doctor", "--deep", "--llama-source", tmp_path), "--deep", "--llama-source")


@pytest.mark.parametrize("place", [".", "absent/kld.json", "/proc/kld.json"])
def test_unwritable_json_is_refused_before_anything_is_measured(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    check_refused(turbokv("kld", "-c", "256", "--chunks", "1", "--cache", "f16", "--json", path), str(path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, '["old"]\n'], ids=["new-file", "old-file"])
def test_disk_that_fills_up_loses_neither_the_result_nor_the_old_file(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "kld.json"
    if old:
        path.write_text(old)
    run = turbokv(
        "kld", "-c", "256", "--chunks", "1", "--cache", "q4_0", "--json", path,
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    assert run.returncode == 1
    assert "q4_0/q4_0" in run.stdout
    assert f"cannot write {path}" in run.stderr
    assert "Traceback" not in run.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({path.name: old} if old else {})


def test_table_that_cannot_be_printed_does_not_lose_the_json(tmp_path: Path) -> None:
    """As with `turbokv kld --json kld.json | head -1`, whose reader is gone before the table comes."""
    path = tmp_path / "kld.json"
    reader, writer = os.pipe()
    os.close(reader)
    command = [COMMAND, "kld", "-c", "256", "--chunks", "1", "--cache", "q4_0", "--json", str(path)]
    subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=300, check=False, env=ENVIRONMENT)
    os.close(writer)
    assert [record["cache"] for record in strict_json(path)] == ["q4_0/q4_0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["evaluate"], "'evaluate'"), (["kld", "--window", "2"], "--window"), (["kld", "-c", "many"], "'--ctx' / '-c'")],
    ids=["command", "option", "value"],
)
def test_wrong_usage_is_explained(arguments: list[str], named: str) -> None:
    run = turbokv(*arguments)
    assert run.returncode == 2
    assert named in run.stderr
    assert "Usage: turbokv" in run.stderr
    assert "Traceback" not in run.stderr


# --- Ctrl-C


def interrupted(line: str, *arguments: str | Path) -> Run:
    """Sends SIGINT as soon as `line` begins a line of progress."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    with process:
        assert process.stderr
        seen = []
        for text in process.stderr:
            seen.append(text)
            if text.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        out, error = process.communicate(timeout=300)
    return Run(process.args, process.returncode, out, "".join(seen) + error)


def test_ctrl_c_keeps_the_finished_windows(tmp_path: Path) -> None:
    path = tmp_path / "kld.json"
    run = interrupted(
        "[2/80]", "kld", "-c", "512", "--chunks", "40", "--cache", "f16", "--no-noise-floor", "--json", path
    )
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    (record,) = strict_json(path)
    finished = record["chunks"]
    assert 1 <= finished < 40
    assert f"{finished} of 40" in run.stderr
    assert "f16/f16" in run.stdout


def test_ctrl_c_before_the_first_window_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kld.json"
    arguments = ("-c", "1024", "--chunks", "4", "--cache", "turbo3", "--no-noise-floor", "--json", path)
    run = interrupted("[1/8]", "kld", *arguments)
    assert run.returncode == 130
    assert run.stdout == ""
    assert "interrupted" in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_doctor_deep_keeps_what_is_measured() -> None:
    run = interrupted("[1/", "doctor", "--deep")
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert re.search("interrupted: --deep got to [1-4] of", run.stderr)
    assert re.search(r"mini-q8_0 f16: +KLD", run.stdout)


CTRL_C_WHILE_LLAMA_CPP_LOGS = """
import collections, signal
from turbokv import cli, engine

class Lines(collections.deque):
    def append(self, line):
        super().append(line)
        if line[1].startswith("llama_context: constructing"):
            signal.raise_signal(signal.SIGINT)

engine.log.lines = Lines(maxlen=400)
cli.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [["kld", "-c", "256", "--chunks", "1", "--cache", "f16"], ["doctor", "--deep"]],
    ids=["kld", "doctor"],
)
def test_ctrl_c_while_llama_cpp_logs_is_not_lost(arguments: list[str]) -> None:
    """Python runs signal handlers in the log callback too, and ctypes drops what a callback raises."""
    run = subprocess.run(
        [sys.executable, "-c", CTRL_C_WHILE_LLAMA_CPP_LOGS, *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert run.returncode == 130
    assert "Traceback" not in run.stderr


# --- help, version, serve


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_of_a_command_shows_an_example(command: str) -> None:
    run = turbokv(command, "-h")
    assert run.returncode == 0
    assert f"Example: turbokv {command}" in run.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("kld", ["mean KLD", "95% CI", "same top", "rounding"]),
        ("kld", ["noise floor", "dNLL", "last 64", "--path", "times slower"]),
        ("ppl", ["true next token", "turbokv kld"]),
        ("types", ["bits per value", "relative MSE"]),
        ("doctor", ["BAD", "exit code", "--deep", "--llama-source"]),
        ("serve", ["llama-server", "--cache-type-k"]),
    ],
)
def test_help_explains_what_the_command_shows(command: str, words: list[str]) -> None:
    text = " ".join(turbokv(command, "-h", COLUMNS="120").stdout.split())
    assert [word for word in words if word not in text] == []


def test_turbokv_alone_shows_every_command() -> None:
    run = turbokv()
    assert [command for command in SUBCOMMANDS if not re.search(rf"│ {command}\b", run.stdout)] == []
    assert "A cache is written K/V" in run.stdout
    assert re.search("Exit codes: 0 done, 1 .*, 3 .*130", " ".join(run.stdout.split()))
    assert run.stderr == ""


def test_version() -> None:
    run = turbokv("--version")
    assert (run.returncode, run.stdout) == (0, f"turbokv {__version__}\n")


def test_types_lists_every_type() -> None:
    run = turbokv("types")
    assert run.returncode == 0
    for kv_type in spec.TYPES:
        assert re.search(rf"\b{kv_type.name}\b", run.stdout)
    assert "…" not in run.stdout


def test_serve_passes_arguments_to_llama_server() -> None:
    run = turbokv("serve", "--", "--version")
    assert run.returncode == 0
    assert "version:" in run.stdout + run.stderr
    refused = turbokv("serve", "--", "--cache-type-k", "turbo9")
    assert refused.returncode != 0
    assert "turbo9" in refused.stderr


def test_serve_has_the_exit_code_of_llama_server(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(b"This is no model.")
    run = turbokv("serve", "-m", path)
    assert run.returncode == 1
    assert str(path) in run.stderr
