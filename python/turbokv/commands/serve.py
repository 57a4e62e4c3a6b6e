"""`turbokv serve`."""

from __future__ import annotations

import os

import typer

from turbokv import data, device, native
from turbokv.commands.options import GpuLayersOption, ModelOption
from turbokv.errors import TurbokvError

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def serve(context: typer.Context, model: ModelOption = data.MINI, gpu_layers: GpuLayersOption = None) -> None:
    """Start the bundled llama-server; everything after `--` goes to it as it is.

    Any llama-server option works there (`turbokv serve -- --help`); its log says which cache types the model really
    got, and how many bytes they take. Without --gpu-layers llama-server puts on a GPU what fits.

    Example: `turbokv serve -m model.gguf -- --cache-type-k turbo3 --cache-type-v turbo3 --port 8080`
    """
    if not model.is_file():
        raise TurbokvError(f"there is no model at {model}")
    server = str(native.tool("llama-server"))
    layers = [] if gpu_layers is None else device.placement(gpu_layers).server_arguments()
    # signals and the exit code are the server's own
    os.execv(server, [server, "--model", str(model), *layers, *context.args])
