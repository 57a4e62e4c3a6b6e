"""`turbokv doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from turbokv import doctor as checks
from turbokv import engine
from turbokv.errors import TurbokvError
from turbokv.terminal import err, out, progress


def doctor(
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also measure that decoding token by token gives the logits that one batch gives, for every type on "
            "both built-in models: a minute or two. `turbokv kld` never decodes, so only this shows a broken decode.",
        ),
    ] = False,
    llama_source: Annotated[
        Path | None,
        typer.Option(
            "--llama-source",
            metavar="DIR",
            help="Instead say which hooks apply to this llama.cpp tree. It is only read, and nothing need be built.",
        ),
    ] = None,
) -> None:
    """What is built, where it lies, which lines were added to llama.cpp, and whether it works.

    Every line marked `BAD` says what is wrong; then the exit code is 1.

    Before you build on a llama.cpp of your own (`cmake -DTURBOKV_LLAMA_SOURCE=DIR`), `--llama-source DIR` says whether
    our lines still find their places in it, and which ones do not.

    Example: `turbokv doctor`, after a change of machine or compiler `turbokv doctor --deep`
    """
    if llama_source and deep:
        raise TurbokvError("--deep measures this build, --llama-source looks at another tree: give one of the two")
    sound = _report(checks.hook_findings(llama_source) if llama_source else checks.findings())
    if deep and not sound:
        raise TurbokvError("--deep was left out: mend what is marked BAD first")
    if deep:
        sound = _report(_decode_findings())
    if not sound:
        raise typer.Exit(1)


def _report(findings: Iterable[checks.Finding]) -> bool:
    """Prints the findings as they come; False if one is bad."""
    marks = {True: "[green]ok [/]", False: "[red]BAD[/]", None: "   "}
    sound = True
    for finding in findings:
        sound &= finding.ok is not False
        value = escape(finding.value).replace("\n", "\n" + 29 * " ")  # below the first line
        out.print(f"{marks[finding.ok]} {finding.name + ':':24} {value}", highlight=False, soft_wrap=True)
    return sound


def _decode_findings() -> list[checks.Finding]:
    """All of --deep at the end, behind its progress; if interrupted, what there is."""
    found: list[checks.Finding] = []
    try:
        with engine.interrupts.deferred(), progress(checks.N_DECODE_FINDINGS) as advance:
            for finding in checks.decode_findings():
                found.append(finding)
                advance(finding.name)
    except KeyboardInterrupt:
        _report(found)
        err.print(f"interrupted: --deep got to {len(found)} of {checks.N_DECODE_FINDINGS} measurements")
        raise typer.Exit(130) from None
    return found
