"""What turbokv writes down: every result and its circumstances, as pydantic models.

A result is what one command measured for one cache: the objects of `--json`. A `Record` is a result with everything
needed to understand it later and to measure it again: a line of a sweep's runs.jsonl. `results/schema.json` is
generated from here.

Units: sizes in bytes, times in seconds, divergences and log-probabilities in nats, shares from 0 to 1. A number that
could not be measured is null; NaN and infinity never stand in a record.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from turbokv.device import ON_CPU, Placement

SCHEMA_VERSION = 1  # of Record: raised when a field changes its meaning or goes; new optional fields do not raise it

Interval = tuple[float, float]  # low, high


class Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="null")


class Estimate(Base):
    """A mean with its 95 % interval, null where there are too few values for one."""

    mean: float | None
    ci95: Interval | None


# --- results, one per command


class Placed(Base):
    """What computed a result. Results of other devices, or with another number of layers there, are not comparable."""

    device: str | None = Field(
        default=None,
        description="CPU, or the GPUs with layers of the model, e.g. NVIDIA H200 or 2 x NVIDIA H200; null in results "
        "from before turbokv used GPUs: CPU",
    )
    gpu_layers: int | None = Field(
        default=None, description="layers on the GPUs, counted from the output: -1 all, 0 none; the others on the CPU"
    )

    @property
    def placement(self) -> Placement:
        return Placement(self.gpu_layers or 0, self.device or ON_CPU.device)


class Cache(Placed):
    """The cache that was measured."""

    cache: str = Field(description="effective types, K/V, e.g. turbo3_64/turbo3_64")
    requested: str = Field(description="as asked for, K/V")
    bits_k: float = Field(description="bits per cached value of K, scales included")
    bits_v: float
    kv_bytes: int = Field(description="bytes of the K and V tensors that llama.cpp allocated")


class Divergence(Base):
    """KL divergence of the next-token distribution from the f16 cache's, over the scored tokens."""

    mean: float | None
    ci95: Interval | None = Field(description="of the mean, block bootstrap")
    median: float | None
    trimmed_mean: float | None = Field(description="without the largest 1 % and the smallest 1 %")
    p99: float | None
    p999: float | None
    max: float | None


class NoiseFloor(Base):
    """f16 against itself, computed in physical batches of another size: what is below it is rounding."""

    n_ubatch: int = Field(description="tokens per physical batch")
    mean_kld: float | None
    same_top: float | None


class Text(Base):
    name: str
    sha256: str = Field(description="first 16 hex digits of the SHA-256 of the text")


class KldResult(Cache):
    """`turbokv kld` and `turbokv ppl`; ppl has null for what compares distributions."""

    kind: Literal["kld", "ppl"]
    ppl: float | None
    ppl_f16: float | None
    delta_nll: Estimate = Field(description="mean over tokens of NLL - NLL of f16, paired; log of the PPL ratio")
    kld: Divergence | None
    same_top: float | None = Field(description="share of tokens whose most likely token is that of f16")
    last64: Divergence | None = Field(description="the same over the last 64 positions of every window only")
    noise_floor: NoiseFloor | None
    non_finite: int = Field(description="scored tokens with a NaN or infinite logit; in no other number")
    ctx: int = Field(description="tokens per window; the second half is scored")
    chunks: int = Field(description="windows measured")
    path: Literal["prefill", "decode"] = Field(description="in batches, or token by token as generation does")
    text: Text
    model: str = Field(description="file name")
    upstream_commit: str
    seconds: float


class Trial(Base):
    """One question about one name. Trials with the same `haystack` share a text and depend on each other."""

    length: int = Field(description="tokens of the prompt: haystack, needles and the longest question")
    depth: float = Field(description="where the needle stands, 0 begin to 1 end of the haystack")
    seed: int
    haystack: int = Field(description="number of the haystack within the run")
    right: bool = Field(description="the right answer is, token by token, the most likely one")
    margin: float | None = Field(
        description="log-probability of the right answer minus that of the best wrong one; mean over the words where "
        "several are asked for; null where a logit was NaN or infinite"
    )
    right_f16: bool
    margin_f16: float | None


class NeedleCell(Base):
    """All trials of one length and depth: a field of the heat map."""

    length: int
    depth: float
    trials: int
    accuracy: float
    margin: float | None
    accuracy_f16: float
    margin_delta: float | None = Field(description="mean of margin - margin of f16, paired")


class NeedleResult(Cache):
    """`turbokv needle`. Intervals by a bootstrap that draws haystacks."""

    kind: Literal["needle"] = "needle"
    task: str = Field(description="form of the needles: single, multivalue, variable")
    accuracy: Estimate = Field(description="no interval where all trials agree")
    accuracy_f16: float
    margin: Estimate
    margin_f16: float | None
    margin_delta: Estimate = Field(description="margin - margin of f16, paired by trial; below 0 is worse than f16")
    lost: int = Field(description="trials that f16 answers right and this cache does not")
    gained: int = Field(description="the other way round")
    non_finite: int = Field(description="trials without a margin here or with f16; in accuracy, but in no margin")
    haystacks: int
    distractors: int = Field(description="other names in every haystack")
    words: int = Field(description="words that a question asks for")
    template: str = Field(description="plain, chat, or the name of a file")
    cells: list[NeedleCell]
    trials: list[Trial]
    text: Text
    model: str
    upstream_commit: str
    seconds: float


class Speed(Base):
    """tokens/s over the rounds; geometric means."""

    mean: float
    ci95: Interval | None
    ratio_f16: float | None = Field(description="this cache / f16 in the same round; above 1 is faster")
    ratio_ci95: Interval | None


class SpeedSample(Base):
    round: int
    pp: float | None
    tg: float | None
    peak_bytes: int | None = Field(default=None, description="largest resident memory of the measuring process")
    joules: float | None = Field(default=None, description="of the whole machine while the process ran")


class SpeedResult(Placed):
    """`turbokv speed`, one cache at one depth."""

    kind: Literal["speed"] = "speed"
    cache: str = Field(description="as asked for, K/V")
    depth: int = Field(description="tokens in the cache before what is measured")
    tg: Speed | None = Field(description="generation")
    pp: Speed | None = Field(description="prompt processing")
    n_gen: int
    n_prompt: int
    threads: int
    rounds: int
    samples: list[SpeedSample]
    peak_bytes: int | None = Field(default=None, description="largest resident memory of the measuring process")
    kv_bytes: int | None = Field(
        default=None, description="bytes of the cache that llama.cpp allocates for depth + max(n_prompt, n_gen) tokens"
    )
    joules_per_token: float | None = Field(
        default=None,
        description="energy of CPU packages and GPUs while llama-bench ran, over all tokens that it computed: loading, "
        "filling the cache, prompt and generation together; null where the platform does not tell",
    )
    error: str | None = Field(description="why the cell was given up; null if it was not")
    model: str
    cpu: str
    OMP_WAIT_POLICY: str
    upstream_commit: str
    build: str
    seed: int


class ServerSample(Base):
    round: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    latencies: list[float] = Field(description="seconds per request, in the order of sending")
    peak_bytes: int | None
    joules: float | None


class ServerResult(Placed):
    """`turbokv speed --parallel`: llama-server over HTTP, `parallel` requests at a time."""

    kind: Literal["server"] = "server"
    cache: str = Field(description="effective types, K/V; as asked for where the model refuses them")
    requested: str = Field(description="as asked for, K/V")
    bits_k: float | None = Field(description="bits per cached value of K, scales included; null where it is refused")
    bits_v: float | None
    parallel: int
    n_prompt: int
    n_gen: int
    requests: int = Field(description="per round")
    tokens_per_second: float | None = Field(
        description="generated tokens of all requests / time from first to last, prompts included; geometric mean"
    )
    ci95: Interval | None = None
    prompt_tokens_per_second: float | None = Field(
        description="of one request while the others run beside it: median in a round, geometric mean over rounds"
    )
    ratio_f16: float | None = Field(description="tokens_per_second / that of f16 in the same round")
    ratio_ci95: Interval | None
    latency_p50: float | None = Field(description="seconds per request, over all rounds")
    latency_p95: float | None
    rounds: int
    samples: list[ServerSample] = []
    peak_bytes: int | None
    kv_bytes: int | None = Field(description="bytes of the cache that llama.cpp allocates for all slots")
    joules_per_token: float | None = Field(
        default=None, description="energy of CPU packages and GPUs over the generated tokens, prompts included"
    )
    error: str | None
    model: str
    threads: int
    upstream_commit: str
    cpu: str | None = None
    OMP_WAIT_POLICY: str | None = None
    build: str | None = None
    seed: int | None = None


class Refusal(Placed):
    """The model does not take this cache; that is a result too."""

    kind: Literal["refusal"] = "refusal"
    task: str = Field(description="the command that was refused")
    cache: str
    reason: str


Result = Annotated[KldResult | NeedleResult | SpeedResult | ServerResult | Refusal, Field(discriminator="kind")]


def requested(result: Result) -> str:
    """The cache as it was asked for, K/V: what results of all kinds have in common."""
    return result.cache if isinstance(result, SpeedResult | Refusal) else result.requested


# --- circumstances


class Model(Base):
    name: str
    bytes: int
    fingerprint: str = Field(description="16 hex digits over samples of the whole file; see fingerprint.py")
    architecture: str
    parameters: int
    n_ctx_train: int | None


class Environment(Base):
    """The machine. Results of speed compare within one machine only."""

    cpu: str
    cores: int = Field(description="cores that the process might use")
    gpu: str | None = Field(description="NVIDIA GPUs of the machine, used or not")
    gpu_driver: str | None = Field(default=None, description="version of NVIDIA's driver")
    os: str
    python: str
    OMP_WAIT_POLICY: str


class Build(Base):
    turbokv: str
    commit: str | None = Field(description="of turbokv's own checkout, null for an installed package")
    dirty: bool | None = Field(description="whether that checkout had changes that are not committed")
    upstream_commit: str
    build: str = Field(description="12 hex digits over the libraries: the overlay may change while commits stay")
    cuda: str | None = Field(default=None, description="version of the CUDA toolkit, null for a build without CUDA")


class Record(Base):
    """One finished cell of a sweep, a line of runs.jsonl."""

    schema_version: Literal[1] = 1
    id: str = Field(description="16 hex digits: what is measured, on which model and machine; a sweep never repeats it")
    command: str = Field(description="the command that measures it again")
    started: str = Field(description="UTC, ISO 8601")
    seconds: float
    model: Model
    layout_k: str = Field(description="byte layout of the effective K type; empty for upstream's types")
    layout_v: str
    environment: Environment
    build: Build
    result: Result


# --- advice: made of results, never a line of runs.jsonl


class Candidate(Base):
    """One cache in `turbokv recommend`. Bytes are llama.cpp's own for this model; null where it refuses the cache."""

    requested: str = Field(description="as asked for, K/V")
    cache: str | None = Field(description="effective types, K/V")
    refused: str | None = Field(description="why the model does not take it; null if it does")
    kv_bytes: int | None = None
    compute_bytes: int | None = None
    total_bytes: int | None = Field(default=None, description="weights + kv + compute")
    fits: bool = False
    longest_ctx: int | None = Field(
        default=None, description="most tokens per request that fit, looked for up to ctx and the trained context"
    )
    kld: Estimate | None = Field(default=None, description="mean KLD, measured on this model; f16's is 0 by definition")
    tg_ratio_f16: float | None = Field(default=None, description="generation, measured on this model")
    tg_ratio_ci95: Interval | None = None


class KldSource(Base):
    """The measurements that `kld` of all candidates comes from: one text, one window size."""

    ctx: int
    chunks: int
    path: str
    text: Text
    placement: str = Field(default=ON_CPU.label, description="what computed them")


class SpeedSource(Base):
    """The machine and depth that the ratios of all candidates come from."""

    depth: int
    threads: int
    cpu: str
    here: bool = Field(description="whether that CPU and GPU are this machine's")
    placement: str = Field(default=ON_CPU.label, description="what computed them")


class Recommendation(Base):
    """`turbokv recommend --json`."""

    kind: Literal["recommendation"] = "recommendation"
    model: str
    fingerprint: str
    architecture: str
    parameters: int
    n_ctx_train: int
    memory: int
    ctx: int = Field(description="tokens per request")
    parallel: int = Field(description="requests at a time, each with its own ctx tokens")
    weights_bytes: int
    kld_source: KldSource | None
    speed_source: SpeedSource | None
    candidates: list[Candidate] = Field(
        description="those that fit, best first; then the others by bytes; refused last"
    )
    recommended: str | None = Field(description="null if none fits")
    command: str | None
    upstream_commit: str
