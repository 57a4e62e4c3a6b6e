"""The command `turbokv`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from turbokv import __version__
from turbokv.commands import testbed
from turbokv.commands.doctor import doctor
from turbokv.commands.kld import kld, ppl
from turbokv.commands.needle import needle
from turbokv.commands.recommend import recommend
from turbokv.commands.report import report
from turbokv.commands.results import results
from turbokv.commands.serve import PASSED_ON, serve
from turbokv.commands.speed import speed
from turbokv.commands.sweep import sweep
from turbokv.commands.types import types
from turbokv.errors import FAILED, REFUSED, CacheRefused, TurbokvError
from turbokv.terminal import err, out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""KV-cache types for llama.cpp, and what they cost on your model.

    A cache is written K/V: `q8_0/turbo3` keeps the keys in q8_0 and the values in turbo3; `turbo3` alone means both.

    To begin: `turbokv doctor` (is the build sound?), `turbokv types` (what is there to choose from?),
    `turbokv recommend -m model.gguf --memory 24GiB` (what fits?), `turbokv serve -m model.gguf` (use it).

    To measure what each choice costs on your model: `turbokv kld`, `turbokv needle`, `turbokv speed`; all of them for
    many models and contexts: `turbokv sweep`, then `turbokv report` (a page to share) and `turbokv results` (SQL).

    Exit codes: 0 done, 1 an error that the last line names, 2 wrong usage, 3 the model does not take a cache type,
    130 interrupted (what was finished is reported).""",
)
for command in (kld, ppl, needle, speed, sweep, results, report, recommend, types, doctor):
    app.command()(command)
app.command(context_settings=PASSED_ON)(serve)
app.add_typer(testbed.app, name="testbed")


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"turbokv {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    try:
        app()
    except TurbokvError as error:
        err.print(f"turbokv: {error}", markup=False)
        sys.exit(REFUSED if isinstance(error, CacheRefused) else FAILED)
    except OSError as error:
        err.print(f"turbokv: {error.filename or 'input/output'}: {error.strerror}", markup=False)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
