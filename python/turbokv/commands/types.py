"""`turbokv types`."""

from __future__ import annotations

from rich.table import Table

from turbokv.spec import TYPES
from turbokv.terminal import out


def types() -> None:
    """The cache types that turbokv adds, with their exact byte layouts.

    f16 has 16 bits per value, q8_0 8.5, q4_0 4.5. `relative MSE` is the error that a type makes on Gaussian values,
    which rotated keys and values nearly are; what it means for a model says `turbokv kld`.

    Example: `turbokv types`
    """
    table = Table("type", "id", "bits per value", "block", "bytes", "relative MSE", "layout", "what")
    for t in TYPES:
        table.add_row(
            t.name, str(t.type_id), f"{t.bits_per_value:g}", str(t.block), str(t.block_bytes), f"{t.relative_mse:g}",
            t.layout_string, t.about,
        )  # fmt: skip
    out.print(table)
    out.print(
        "Type the short name (turbo3): the context takes the _64 type for heads that 128 does not divide, and logs it."
    )
