"""Records for tests: one valid record, and copies of it with changes."""

from __future__ import annotations

from typing import Any

from turbokv.record import Build, Divergence, Environment, Estimate, KldResult, Model, Record, Text


def kld_result(cache: str = "turbo3/turbo3", **changes: Any) -> KldResult:
    divergence = Divergence(mean=0.04, ci95=(0.035, 0.045), median=0.02, trimmed_mean=0.03, p99=0.3, p999=0.8, max=1.5)
    values: dict[str, Any] = {
        "cache": cache, "requested": cache, "bits_k": 3.125, "bits_v": 3.125, "kv_bytes": 1 << 20, "kind": "kld",
        "ppl": 15.5, "ppl_f16": 15.1, "delta_nll": Estimate(mean=0.03, ci95=(0.02, 0.04)), "kld": divergence,
        "same_top": 0.88, "last64": None, "noise_floor": None, "non_finite": 0, "ctx": 512, "chunks": 4,
        "path": "prefill", "text": Text(name="sample.txt", sha256="0" * 16), "model": "mini-q8_0.gguf",
        "upstream_commit": "c" * 40, "seconds": 3.5,
    }  # fmt: skip
    return KldResult(**values | changes)


def record(id: str = "0123456789abcdef", **changes: Any) -> Record:
    values: dict[str, Any] = {
        "id": id, "command": "turbokv kld -m mini -c 512 --cache turbo3", "started": "2026-11-22T20:00:00Z",
        "seconds": 4.5, "layout_k": "turbo3/1", "layout_v": "turbo3/1", "result": kld_result(),
        "model": Model(
            name="mini-q8_0.gguf", bytes=17_000_000, fingerprint="f" * 16, architecture="qwen3",
            parameters=16_000_000, n_ctx_train=8192,
        ),
        "environment": Environment(cpu="CPU", cores=2, gpu=None, os="Linux", python="3.11", OMP_WAIT_POLICY=""),
        "build": Build(turbokv="0.1.0", commit="a" * 40, dirty=False, upstream_commit="c" * 40, build="b" * 12),
    }  # fmt: skip
    return Record(**values | changes)
