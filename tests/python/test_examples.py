"""The examples of every --help run as they stand, in a folder with a model.gguf and a book.txt."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from turbokv import cli, data

# Those that need the results of another come behind it; serve runs until it is stopped.
FIRST = ("sweep", "kld", "testbed")


def documented(app: typer.Typer, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(name, docstring) of every command, those of groups too."""
    for command in app.registered_commands:
        assert command.callback
        yield " ".join((*prefix, command.name or command.callback.__name__)), command.callback.__doc__ or ""
    for group in app.registered_groups:
        assert group.typer_instance and group.name
        yield from documented(group.typer_instance, (*prefix, group.name))


def examples(text: str) -> list[str]:
    """The commands that stand behind `Example:`."""
    _, _, behind = text.partition("Example:")
    return [re.sub(r"\s+", " ", command) for command in re.findall(r"`(turbokv [^`]+)`", behind)]


COMMANDS = {name: examples(text) for name, text in documented(cli.app)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_of_itself(name: str) -> None:
    assert any(command.startswith(f"turbokv {name}") for command in COMMANDS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    (path / "model.gguf").symlink_to(data.MINI)
    (path / "book.txt").symlink_to(data.SAMPLE)
    (path / "plan.toml").write_text('models = ["mini"]\n[kld]\nctx = [64]\ntokens = 64\n')
    return path


def runs(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


ORDER = sorted(COMMANDS, key=lambda name: (name.split()[0] not in FIRST, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ORDER if name != "serve"])
def test_examples_run(name: str, folder: Path) -> None:
    for command in COMMANDS[name]:
        if "-f wikitext2" in command:
            command = command.replace("-f wikitext2", "-f book.txt").replace("--chunks -1", "--chunks 1")  # no network
        done = runs(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_example_of_serve_starts(folder: Path) -> None:
    (command,) = COMMANDS["serve"]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *shlex.split(command)], cwd=folder, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while "listening" not in (folder / "serve.log").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "serve.log").read_text()[
                    -2000:
                ]
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
