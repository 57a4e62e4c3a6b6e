"""Outlier variants: the profiles, the patched bytes, what is refused, and what breaks on an imprinted model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from measured import measured
from numpy.typing import NDArray
from turbokv import cache_type, data, engine, perplexity, testbed
from turbokv.errors import TurbokvError

# --- profiles


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize(("profile", "published"), [("mild", 550), ("extreme", 71_000)])
def test_every_layer_has_the_published_ratio(profile: str, published: float, head_dim: int) -> None:
    energies = testbed.pair_energies(profile, 40, head_dim)
    assert energies.shape == (40, head_dim // 2)
    ratios = testbed.max_to_median(energies)
    np.testing.assert_allclose(ratios, published, rtol=0.10)
    assert np.ptp(ratios) > 0.02 * published


def test_outliers_are_few_among_the_slow_pairs_and_elsewhere_in_each_layer() -> None:
    outliers = testbed.pair_energies("extreme", 40, 128) > 100
    assert outliers.sum(axis=1).tolist() == [3] * 40
    assert not outliers[:, :32].any()
    assert outliers.any(axis=0).sum() > 25


def test_parametric_profiles_are_the_same_on_every_machine_and_for_every_number_of_layers() -> None:
    energies = testbed.pair_energies("mild", 8, 128)
    assert energies[0, :4].tolist() == [1.268, 1.101, 1.899, 0.8351]
    assert energies[7, -4:].tolist() == [3.067, 0.6559, 0.7212, 1.755]
    np.testing.assert_array_equal(energies, testbed.pair_energies("mild", 20, 128)[:8])


def save_profile(path: Path, k: NDArray[Any]) -> Path:
    np.savez(path, K=k, V=np.ones_like(k))
    return path


def layered_profile(n_layers: int, head_dim: int = 128) -> NDArray[np.float32]:
    """[n_layers, 2, head_dim]; energy of KV head 0's channel i in layer l: l * head_dim + i + 1."""
    k = np.ones((n_layers, 2, head_dim), np.float32)
    k[:, 0] += np.arange(n_layers * head_dim, dtype=np.float32).reshape(n_layers, head_dim)
    return k


@pytest.mark.parametrize(
    ("n_profile", "n_model", "taken"),
    [(4, 4, [0, 1, 2, 3]), (28, 8, [0, 4, 8, 12, 15, 19, 23, 27]), (3, 5, [0, 0, 1, 2, 2]), (4, 1, [0])],
)
def test_layers_take_the_profile_layer_of_the_same_depth(
    n_profile: int, n_model: int, taken: list[int], tmp_path: Path
) -> None:
    k = layered_profile(n_profile)
    energies = testbed.pair_energies(str(save_profile(tmp_path / "p.npz", k)), n_model, 128)
    np.testing.assert_array_equal(energies, (k[:, 0, :64] + k[:, 0, 64:])[taken])


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (np.ones((4, 128)), r"shape \[4, 128\]"),
        (np.ones((0, 2, 128)), r"shape \[0, 2, 128\]"),
        (np.ones((4, 2, 64)), "heads of 64, the model has heads of 128"),
        (np.full((4, 2, 128), -1.0), "1024 of the energies"),
        (np.where(np.arange(128) == 5, 0.0, np.ones((4, 2, 128))), "8 of the energies"),
        (np.where(np.arange(128) == 5, np.nan, np.ones((4, 2, 128))), "8 of the energies"),
        (np.where(np.arange(128) == 5, np.inf, np.ones((4, 2, 128))), "8 of the energies"),
        (np.full((4, 2, 128), "a"), r"not an \.npz file of numbers"),
        (np.full((4, 2, 128), None), r"not an \.npz file of numbers"),
    ],
)
def test_wrong_energies_are_refused(k: NDArray[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TurbokvError, match=message):
        testbed.load_profile(save_profile(tmp_path / "p.npz", k), 128)


def test_wrong_profile_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TurbokvError, match=r"no profile .*typo: give an \.npz file, mild or extreme"):
        testbed.load_profile(tmp_path / "typo", 128)
    with pytest.raises(TurbokvError, match=r"cannot read .*directory"):
        testbed.load_profile(tmp_path, 128)
    path = tmp_path / "p.npz"
    np.savez(path, V=np.ones((4, 2, 128)))
    with pytest.raises(TurbokvError, match="no array K"):
        testbed.load_profile(path, 128)
    whole = save_profile(path, np.ones((4, 2, 128))).read_bytes()
    for content in (b"", b"energies\n", whole[: len(whole) // 2], whole.replace(b"NUMPY", b"numpy")):
        path.write_bytes(content)
        with pytest.raises(TurbokvError, match=r"not an \.npz file of numbers"):
            testbed.load_profile(path, 128)
    with (tmp_path / "k.npy").open("wb") as file:
        np.save(file, np.ones((4, 2, 128)))
    with pytest.raises(TurbokvError, match=r"not an \.npz file of numbers"):
        testbed.load_profile(tmp_path / "k.npy", 128)


# --- the patched file


def norms_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors if t.name.endswith(("q_norm.weight", "k_norm.weight"))}


@pytest.fixture(scope="module")
def mini_norms() -> dict[str, gguf.ReaderTensor]:
    return norms_of(data.MINI)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mini with each built-in profile."""
    folder = tmp_path_factory.mktemp("testbed")
    for profile in testbed.PARAMETRIC:
        testbed.imprint(data.MINI, profile, folder / f"{profile}.gguf")
    return {profile: folder / f"{profile}.gguf" for profile in testbed.PARAMETRIC}


def test_all_but_the_norms_are_the_bytes_of_the_model(
    variants: dict[str, Path], mini_norms: dict[str, gguf.ReaderTensor]
) -> None:
    mini, variant = (np.frombuffer(path.read_bytes(), np.uint8) for path in (data.MINI, variants["extreme"]))
    elsewhere = np.ones(mini.size, bool)
    for norm in mini_norms.values():
        elsewhere[norm.data_offset : norm.data_offset + norm.n_bytes] = False
    assert len(mini_norms) == 16
    assert variant.size == mini.size
    np.testing.assert_array_equal(variant[elsewhere], mini[elsewhere])


def test_norms_are_scaled_by_opposite_factors_that_pairs_share(
    variants: dict[str, Path], mini_norms: dict[str, gguf.ReaderTensor]
) -> None:
    for layer, energies in enumerate(testbed.pair_energies("extreme", 8, 128)):
        q, k = (mini_norms[f"blk.{layer}.attn_{which}_norm.weight"] for which in "qk")
        new_q, new_k = (np.fromfile(variants["extreme"], "<f4", 128, offset=norm.data_offset) for norm in (q, k))
        factors = np.sqrt(energies / np.exp(np.log(energies).mean()))
        for half in (slice(0, 64), slice(64, 128)):
            np.testing.assert_allclose(new_k[half], k.data[half] * factors, rtol=1e-6)
        np.testing.assert_allclose(new_q.astype(np.float64) * new_k, q.data.astype(np.float64) * k.data, rtol=2**-23)


def write_model(
    path: Path,
    *,
    architecture: str = "qwen3",
    block_count: int | None = 3,
    norms: int = 3,
    head_dim: int = 64,
    dtype: type[np.generic] = np.float32,
) -> Path:
    """A model file with nothing in it but the norms."""
    writer = gguf.GGUFWriter(path, architecture)
    if block_count is not None:
        writer.add_block_count(block_count)
    for layer in range(norms):
        for which in "qk":
            writer.add_tensor(f"blk.{layer}.attn_{which}_norm.weight", np.full(head_dim, 2, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_heads_of_64_an_older_copy_replaced_and_the_model_untouched(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model.gguf"), tmp_path / "out.gguf"
    before = model.read_bytes()
    out.write_bytes(b"an older copy")
    profile = save_profile(tmp_path / "p.npz", layered_profile(5, 64))
    energies = testbed.imprint(model, str(profile), out)
    np.testing.assert_array_equal(energies, testbed.pair_energies(str(profile), 3, 64))
    for layer, factors in enumerate(testbed.scale_factors(energies)):
        after = norms_of(out)[f"blk.{layer}.attn_k_norm.weight"].data
        np.testing.assert_allclose(after, 2 * np.tile(factors, 2), rtol=1e-6)
    assert model.read_bytes() == before


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama"}, "architecture llama; .* qwen3 and qwen3moe only"),
        ({"architecture": "qwen35"}, "architecture qwen35"),
        ({"norms": 2}, "no attn_q_norm in layer 2"),
        ({"block_count": None}, "how many layers"),
        ({"dtype": np.float16}, "is F16"),
        ({"head_dim": 63}, r"sizes \[63\]"),
    ],
)
def test_models_that_would_change_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model.gguf", **changes), tmp_path / "out.gguf"
    with pytest.raises(TurbokvError, match=message):
        testbed.imprint(model, "mild", out)
    assert not out.exists()


def test_broken_model_files_are_refused(tmp_path: Path) -> None:
    model, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    with pytest.raises(TurbokvError, match="there is no model at"):
        testbed.imprint(model, "mild", out)
    whole = write_model(model).read_bytes()
    for content in (b"", b"GGUF", b"no model at all", *(whole[:n] for n in range(30, len(whole), 97))):
        model.write_bytes(content)
        with pytest.raises(TurbokvError, match="no whole GGUF model"):
            testbed.imprint(model, "mild", out)
    assert not out.exists()


def test_the_model_itself_is_never_overwritten(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    before = model.read_bytes()
    (tmp_path / "link.gguf").symlink_to(model)
    for out in (model, tmp_path / "link.gguf"):
        with pytest.raises(TurbokvError, match="is the model itself"):
            testbed.imprint(model, "mild", out)
    assert model.read_bytes() == before


def test_nothing_is_left_where_the_copy_cannot_be_written(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    with pytest.raises(TurbokvError, match=r"folder .* does not exist"):
        testbed.imprint(model, "mild", tmp_path / "nowhere" / "out.gguf")
    with pytest.raises(TurbokvError, match="is a folder"):
        testbed.imprint(model, "mild", tmp_path)
    assert list(tmp_path.iterdir()) == [model]


# --- behaviour on the built-in text: one window of 512 tokens

CTX = 512


def mean_klds(model_path: Path, caches: str) -> dict[str, float]:
    return {cache: record["kld"]["mean"] for cache, record in measured(model_path, None, caches, CTX, 1).items()}


def f16_logits(model_path: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Logits [CTX/2, n_vocab] of the second half of the first window, and the tokens that follow."""
    with engine.Model(model_path) as model:
        tokens = model.tokenize(data.read_text(None))
        window = perplexity.windows(model, tokens, CTX, 1)[0]
        with engine.Context(model, cache_type.F16, CTX, engine.default_threads()) as context:
            logits = np.concatenate([part.copy() for part in context.logits(window, CTX // 2)])
    return logits[:-1], window[CTX // 2 + 1 :]


@pytest.fixture(scope="module")
def mini_logits() -> NDArray[np.float32]:
    return f16_logits(data.MINI)[0]


@pytest.mark.parametrize("profile", list(testbed.PARAMETRIC))
def test_f16_still_computes_the_same_function(
    profile: str, variants: dict[str, Path], mini_logits: NDArray[np.float32]
) -> None:
    """Measured: KLD .00026 for both, what another rounding costs; NLL 2.8362, then 2.8365 and 2.8347."""
    logits, targets = f16_logits(variants[profile])
    own, mini = perplexity.score(logits, mini_logits, targets), perplexity.score(mini_logits, None, targets)
    assert own.kld.mean() < 0.0005
    assert own.nll.mean() == pytest.approx(mini.nll.mean(), abs=0.005)


def test_extreme_outliers_break_4_bits_and_spare_8(variants: dict[str, Path]) -> None:
    """Measured: q8_0 .0163, q4_0 4.54, turbo4 4.43, turbo3 5.17, q8_0/turbo3 .0292: it is K that breaks."""
    extreme = mean_klds(variants["extreme"], "q8_0,q4_0,q8_0/turbo3")
    assert extreme["q4_0/q4_0"] > 1
    assert extreme["q8_0/q8_0"] < 0.021
    assert extreme["q8_0/turbo3"] < 0.037


def test_mild_outliers_cost_what_was_measured(variants: dict[str, Path]) -> None:
    """Measured: q8_0 .00049, q4_0 .0246, turbo4 .0525, turbo3 .284; without outliers .00035, .0072, .0078, .0260."""
    mild = mean_klds(variants["mild"], "q8_0,q4_0,turbo4,turbo3")
    assert mild["q8_0/q8_0"] < 0.0007
    assert mild["q4_0/q4_0"] < 0.031
    assert mild["turbo4/turbo4"] < 0.066
    assert mild["turbo3/turbo3"] < 0.36


# --- the command


def imprint(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turbokv", "testbed", "imprint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_command_writes_what_the_function_writes_and_says_how_large_the_outliers_are(tmp_path: Path) -> None:
    out, direct = tmp_path / "out.gguf", tmp_path / "direct.gguf"
    run = imprint("--profile", "extreme", "-o", out)
    assert (run.returncode, run.stderr) == (0, "")
    testbed.imprint(data.MINI, "extreme", direct)
    assert re.search(r"8 layers, largest K outlier [\d,]+ to [\d,]+ times the median", run.stdout)
    assert out.read_bytes() == direct.read_bytes()


def test_command_refuses_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for model, word in ((data.BIAS, "architecture llama"), (data.SAMPLE, "no whole GGUF model")):
        run = imprint("--profile", "mild", "-o", tmp_path / "out.gguf", "-m", model)
        assert run.returncode == 1
        assert word in run.stderr and len(run.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# --- behaviour with the statistics of real models


def imprinted(repo: Path, name: str, tmp_path: Path) -> Path:
    profile = repo.parent / "shared" / "testbed" / f"kv_second_moments_{name}.npz"
    if not profile.is_file():
        pytest.skip(f"no {profile}: published statistics that are not ours to carry")
    testbed.imprint(data.MINI, str(profile), tmp_path / "out.gguf")
    return tmp_path / "out.gguf"


def test_statistics_of_qwen2_5_7b_break_4_bits(repo: Path, tmp_path: Path) -> None:
    """Measured: q8_0 .0018, q4_0 2.79, turbo4 3.29, turbo3 4.40."""
    klds = mean_klds(imprinted(repo, "qwen2.5-7b", tmp_path), "q8_0,q4_0")
    assert klds["q4_0/q4_0"] > 1
    assert klds["q8_0/q8_0"] < 0.0024


def test_statistics_of_llama_3_1_8b_break_nothing(repo: Path, tmp_path: Path) -> None:
    """Measured: q4_0 .0110, turbo4 .0121, turbo3 .0507."""
    klds = mean_klds(imprinted(repo, "llama-3.1-8b", tmp_path), "q4_0,turbo4,turbo3")
    assert klds["q4_0/q4_0"] < 0.014
    assert klds["turbo4/turbo4"] < 0.015
    assert klds["turbo3/turbo3"] < 0.063
