"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbokv import data

ModelOption = Annotated[
    Path,
    typer.Option(
        "--model", "-m", parser=data.model_path, metavar="FILE",
        help="GGUF model; `mini` and `bias` are built in.", show_default="mini",
    ),
]  # fmt: skip
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text", "-f", help="Text file, or `wikitext2` (downloaded and checked).", show_default="the built-in sample"
    ),
]
CtxOption = Annotated[
    int,
    typer.Option(
        "--ctx", "-c", help="Tokens per window; the second half of each is scored. Best the length that you will use."
    ),
]
ChunksOption = Annotated[int, typer.Option("--chunks", help="Windows to measure; -1 means all that the text has.")]
CacheOption = Annotated[
    str, typer.Option("--cache", help="Comma-separated caches, each K/V or one type for both: `turbo4,q8_0/turbo3`.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", "-t", min=0, help="CPU threads; 0 means all cores of this process.")
]
GpuLayersOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-layers",
        "-ngl",
        metavar="N|all",
        help="Layers on the GPUs, their cache with them; 0 leaves GPUs out.",
        show_default="all if the build and the machine have a GPU, else 0",
    ),
]
