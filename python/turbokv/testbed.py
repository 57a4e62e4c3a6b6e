"""Outlier variants of a model: its own function, with the K cache of a model that is hard to quantize.

Some K channels of real models carry hundreds of times the energy E[x^2] of their head's median channel (up to 550
in Llama-3.1-8B), or tens of thousands of times (71,000 in Qwen2.5-7B), and that is what breaks 4-bit caches. The
built-in models have no such channels. Where Q and K are RMS-normalized per head before RoPE, they can be given some:

    attn_k_norm.weight *= s        attn_q_norm.weight /= s

scales channel i of every K by s[i] and of every Q by 1/s[i], and leaves their products, and so all that the model
computes, as they were. RoPE mixes the channels i and i + head_dim/2 (NEOX order): the two share one factor.

Limit: K and Q energies are opposed here by construction; in real models they are often aligned. These variants show
whether a codec bears outliers, not how it should spend bits on channels.
"""

from __future__ import annotations

import math
import random
import statistics
import zipfile
import zlib
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from turbokv import data
from turbokv.errors import TurbokvError

PARAMETRIC = {"mild": 550.0, "extreme": 71_000.0}  # built-in profile: energy of the top channel / of the median
BODY_SIGMA = 0.7  # of the log energies without outliers; published caches have about .6 to .7
OUTLIERS, OUTLIER_STEP = 3, 4.0  # outlier pairs per head; each has a quarter of the energy of the one before

# Read in llama.cpp's source: Q and K norms of one weight per channel of a head, then NEOX RoPE over the whole head.
ARCHITECTURES = ("qwen3", "qwen3moe")

Array = NDArray[np.float64]


def imprint(model: Path, profile: str, out: Path) -> Array:
    """Writes a copy of `model` with the outliers of `profile` to `out`, whole or not at all, and returns the energies
    that it imprinted, float64 [layers, pairs]. Everything but the Q and K norms is the same bytes.

    profile: `mild`, `extreme`, or the path of an .npz file (load_profile). Raises TurbokvError for models on which
    this would change the function, and for broken files.
    """
    if out.exists() and model.exists() and out.samefile(model):
        raise TurbokvError(f"{out} is the model itself: give the copy another name")
    data.check_writable(out)
    reader = _open(model)
    norms = _norms(reader, model)
    energies = pair_energies(profile, len(norms), norms[0][0].size)
    for (q_norm, k_norm), s in zip(norms, scale_factors(energies), strict=True):
        both = np.tile(s, 2)
        q_norm[:] = q_norm / both
        k_norm[:] = k_norm * both
    data.write_atomically(out, reader.data.data)
    return energies


def pair_energies(profile: str, n_layers: int, head_dim: int) -> Array:
    """Energies of the RoPE pairs for each layer of a model, float64 [n_layers, head_dim / 2]."""
    if profile in PARAMETRIC:
        return parametric(PARAMETRIC[profile], n_layers, head_dim)
    energies = load_profile(Path(profile), head_dim)
    step = (len(energies) - 1) / max(n_layers - 1, 1)
    return energies[[round(i * step) for i in range(n_layers)]]


def parametric(ratio: float, n_layers: int, head_dim: int) -> Array:
    """A made-up profile: log-normal energies with median 1, and a few outlier pairs of which the largest has `ratio`
    times the median, give or take 5 %. They lie among the slow half of the pairs, as in published caches, in each
    layer elsewhere. float64 [n_layers, head_dim / 2].

    The same values on every machine: quantiles instead of a sample, four digits, and of `random` only the sequence
    that Python promises to keep.
    """
    n_pairs = head_dim // 2
    normal = statistics.NormalDist(sigma=BODY_SIGMA)
    body = [math.exp(normal.inv_cdf((i + 0.5) / n_pairs)) for i in range(n_pairs - OUTLIERS)]
    layers = []
    for layer in range(n_layers):
        rng = random.Random(layer)
        energies = sorted(body, key=lambda _: rng.random())
        top = ratio * (0.95 + 0.1 * rng.random())
        for i in range(OUTLIERS):
            slow = n_pairs // 2 + int(rng.random() * (len(energies) - n_pairs // 2 + 1))
            energies.insert(slow, top / OUTLIER_STEP**i)
        layers.append([float(f"{energy:.4g}") for energy in energies])
    return np.array(layers)


def load_profile(path: Path, head_dim: int) -> Array:
    """Energies of the RoPE pairs of KV head 0, float64 [layers, head_dim / 2], from an .npz file whose array `K` holds
    E[x^2] of every K channel, [layers, kv_heads, head_dim]. Other arrays in the file are not read."""
    try:
        with np.load(path) as arrays:
            energies = np.asarray(arrays["K"], np.float64)
    except FileNotFoundError:
        raise TurbokvError(f"there is no profile {path}: give an .npz file, {' or '.join(PARAMETRIC)}") from None
    except OSError as error:
        raise TurbokvError(f"cannot read {path}: {error.strerror or error}") from None
    except KeyError:
        raise TurbokvError(f"{path} has no array K: energies E[x^2], [layers, kv_heads, head size]") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        raise TurbokvError(
            f"{path} is not an .npz file of numbers, as numpy.savez writes them, or is damaged"
        ) from None
    if energies.ndim != 3 or 0 in energies.shape:
        raise TurbokvError(f"K in {path} has the shape {list(energies.shape)}, not [layers, kv_heads, head size]")
    if energies.shape[2] != head_dim:
        raise TurbokvError(f"{path} is for heads of {energies.shape[2]}, the model has heads of {head_dim}")
    bad = int((~(np.isfinite(energies) & (energies > 0))).sum())
    if bad:
        raise TurbokvError(f"{bad} of the energies in {path} are zero, negative or not finite: no factor follows")
    pairs: Array = energies[:, 0, : head_dim // 2] + energies[:, 0, head_dim // 2 :]
    return pairs


def scale_factors(energies: Array) -> Array:
    """What K's channels are multiplied by: sqrt(energy / geometric mean), over the last axis. Their product is 1."""
    log = np.log(energies)
    factors: Array = np.exp((log - log.mean(axis=-1, keepdims=True)) / 2)
    return factors


def max_to_median(energies: Array) -> Array:
    """The size of the outliers, one number per layer: [layers, pairs] -> [layers]."""
    ratios: Array = energies.max(axis=-1) / np.median(energies, axis=-1)
    return ratios


def _open(model: Path) -> gguf.GGUFReader:
    """The file as a private memory map: what is assigned to its tensors stays in memory."""
    if not model.is_file():
        raise TurbokvError(f"there is no model at {model}")
    try:
        return gguf.GGUFReader(model, "c")
    except OSError as error:
        raise TurbokvError(f"cannot read {model}: {error.strerror}") from None
    except (ValueError, IndexError, KeyError) as error:
        raise TurbokvError(f"{model} is no whole GGUF model ({error}): is the download complete?") from None


def _norms(reader: gguf.GGUFReader, model: Path) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The weights of the Q and the K norm of each layer, each [head_dim], as views into the reader's data."""

    def value(key: str) -> object:
        field = reader.get_field(key)
        return field.contents() if field else None

    architecture = value("general.architecture")
    if architecture not in ARCHITECTURES:
        raise TurbokvError(
            f"{model} has the architecture {architecture}; without a change of its function, outliers can be imprinted "
            f"on {' and '.join(ARCHITECTURES)} only: per-head Q and K norms, then NEOX RoPE over the whole head"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    n_layers = value(f"{architecture}.block_count")
    if not isinstance(n_layers, int) or n_layers < 1:
        raise TurbokvError(f"{model} does not say how many layers it has ({architecture}.block_count): {n_layers}")

    def weight(layer: int, norm: str) -> NDArray[np.float32]:
        tensor = tensors.get(f"blk.{layer}.{norm}.weight")
        if tensor is None:
            raise TurbokvError(f"{model} has no {norm} in layer {layer}: is it one part of a split model? Join them")
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or tensor.data.ndim != 1:
            raise TurbokvError(
                f"{tensor.name} in {model} is {tensor.tensor_type.name} {tensor.data.shape}, not f32 [n]"
            )
        return tensor.data

    norms = [(weight(layer, "attn_q_norm"), weight(layer, "attn_k_norm")) for layer in range(n_layers)]
    sizes = {w.size for pair in norms for w in pair}
    if len(sizes) > 1 or any(size % 2 for size in sizes):
        raise TurbokvError(f"the Q and K norms of {model} have sizes {sorted(sizes)}: one even head size is expected")
    return norms
