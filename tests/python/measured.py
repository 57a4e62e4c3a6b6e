"""What caches cost on a model and a text, through the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbokv import cache_type, data, engine, perplexity

Records = dict[str, dict[str, Any]]


def measured(model_path: Path, text: str | None, caches: str, n_ctx: int, n_windows: int) -> Records:
    """Records by effective cache name."""
    with engine.Model(model_path) as model:
        measurement = perplexity.measure(
            model,
            model.tokenize(data.read_text(text)),
            cache_type.parse_pairs(caches),
            n_ctx=n_ctx,
            n_windows=n_windows,
            n_threads=engine.default_threads(),
            with_kld=True,
        )
    return {record.cache: record.model_dump(mode="json") for record in perplexity.records(measurement)}
