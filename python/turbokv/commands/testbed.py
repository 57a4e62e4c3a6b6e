"""`turbokv testbed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbokv import data
from turbokv.commands.options import ModelOption
from turbokv.terminal import out

app = typer.Typer(
    no_args_is_help=True,
    help="""Test models that are harder on a cache than the built-in ones.

    Example: `turbokv testbed imprint --profile extreme -o extreme.gguf`""",
)


@app.command()
def imprint(
    profile: Annotated[str, typer.Option("--profile", "-p", help="`mild`, `extreme`, or an .npz file of K energies.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The GGUF file to write.")],
    model: ModelOption = data.MINI,
) -> None:
    """Write a copy of a model that computes the same, with the K-cache outliers of a model that is hard to quantize.

    Some models have K channels with thousands of times the energy of their neighbours, which breaks 4-bit caches; the
    built-in models have none. Here the weights of the K norm are multiplied by a profile and those of the Q norm
    divided by it: every product of Q and K, and so the perplexity of the f16 cache, stays, but for rounding. Works on
    qwen3 and qwen3moe models.

    Profiles: `mild` has outliers of 550 times the median energy (published for Llama-3.1-8B), `extreme` of 71,000
    times (Qwen2.5-7B), made up but for that number. An .npz file gives the statistics of a real model: an array `K`,
    [layers, kv_heads, head size], with the mean square E[x^2] of every K channel; KV head 0 is taken.

    Example: `turbokv testbed imprint --profile extreme -o extreme.gguf`, then
    `turbokv kld -m extreme.gguf -c 512 --chunks 2 --cache q8_0,q4_0,q8_0/turbo3`
    """
    from turbokv import testbed  # it needs gguf, which is slow to import and which no other command needs

    ratios = testbed.max_to_median(testbed.imprint(model, profile, output))
    out.print(
        f"{output}: {len(ratios)} layers, largest K outlier {ratios.min():,.0f} to {ratios.max():,.0f} times the "
        "median energy",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
