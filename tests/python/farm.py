"""The regression farm: upstream's tiny random models, one per architecture, with every cache type.

`test-llama-archs -o` writes the models. `decode` asks each of them for logits with a given cache, `state_tests` runs
upstream's save and load tests on it. Every attempt has a process of its own, because a fault may end it.

Run as a script this file is the worker that `decode` starts.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from turbokv import native
from turbokv.cache_type import CachePair
from turbokv.engine import Context, Model
from turbokv.errors import TurbokvError

WORKERS = 2
SEED = 3  # of the weights; test-llama-archs takes another one each time if it may
PROMPT, STEPS = 64, 16  # tokens decoded as one batch, and after it one by one

# Workers have one thread: they are forked, and threads do not survive that.
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}


def write_models(folder: Path, architectures: str = "", stdev: float = 0.1) -> list[Path]:
    """Writes `folder/NAME/NAME.gguf` for every architecture whose name matches the regular expression, 7 MB each.

    stdev is the standard deviation of all weights. With upstream's 0.1 every token attends to all others alike, and
    errors average out; with 0.4 attention chooses, and errors of K and V show in the logits as large as they are.
    """
    folder.mkdir()
    options: list[str | Path] = ["-o", folder, "-a", architectures, "-d", str(stdev), "-s", str(SEED)]
    subprocess.run([native.tool("test-llama-archs"), *options], capture_output=True, check=True, timeout=300)
    models = []
    for path in sorted(folder.glob("*.gguf")):
        path.with_suffix("").mkdir()  # test-save-load-state takes folders
        models.append(path.rename(path.with_suffix("") / path.name))
    return models


# --- logits


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt: exactly one field is set."""

    logits: NDArray[np.float32] | None = None  # [STEPS, n_vocab]
    refused: str = ""  # the error message
    died: str = ""  # name of the signal


PATHS = ("plain", "shifted")  # shifted: the positions move between prompt and steps, as --context-shift moves them


def decode(models: Sequence[Path], pair: CachePair) -> dict[str, dict[str, Outcome]]:
    """Path -> model name -> logits with that cache."""

    def run(part: Sequence[Path]) -> dict[str, dict[str, Outcome]]:
        worker = subprocess.run(
            [sys.executable, __file__, pair.k, pair.v, *part], capture_output=True, env=ENVIRONMENT, timeout=1200
        )
        assert worker.returncode == 0, worker.stderr.decode()
        outcomes: dict[str, dict[str, Outcome]] = pickle.loads(worker.stdout)
        return outcomes

    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(run, (models[i::WORKERS] for i in range(min(WORKERS, len(models))))))
    return {path: {name: outcome for part in parts for name, outcome in part[path].items()} for path in PATHS}


def work(k: str, v: str, *models: str) -> None:
    """The worker: one more process per attempt."""
    native.llama()  # once, for all of them
    pair = CachePair(k, v)
    outcomes = {
        path: {Path(model).stem: _forked(partial(_logits, Path(model), pair, path == "shifted")) for model in models}
        for path in PATHS
    }
    pickle.dump(outcomes, sys.stdout.buffer)


def _forked(task: Callable[[], NDArray[np.float32]]) -> Outcome:
    """Runs task() in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "wb") as pipe:
            try:
                outcome = Outcome(logits=task())
            except TurbokvError as error:
                outcome = Outcome(refused=str(error))
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        return Outcome(died=signal.Signals(-status).name)
    outcome = pickle.loads(answer)
    assert isinstance(outcome, Outcome)
    return outcome


def _logits(path: Path, pair: CachePair, shift: bool) -> NDArray[np.float32]:
    """Logits [STEPS, n_vocab] after a prompt of PROMPT tokens."""
    with Model(path) as model, Context(model, pair, n_ctx=256, n_threads=1) as context:
        lib = native.llama()
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, PROMPT + STEPS, dtype=np.int32)

        def feed(part: NDArray[np.int32]) -> NDArray[np.float32]:
            ids = (lib.llama_token * len(part))(*part.tolist())  # the batch only points to them
            if lib.llama_decode(context.handle, lib.llama_batch_get_one(ids, len(part))):
                raise TurbokvError("llama_decode failed")
            return np.ctypeslib.as_array(lib.llama_get_logits_ith(context.handle, -1), (model.n_vocab,)).copy()

        feed(tokens[:PROMPT])
        if shift:
            memory = lib.llama_get_memory(context.handle)
            if not memory or not lib.llama_memory_can_shift(memory) or not lib.llama_memory_seq_rm(memory, 0, 8, 16):
                raise TurbokvError("llama.cpp cannot shift this cache")
            lib.llama_memory_seq_add(memory, 0, 16, -1, -8)
        return np.stack([feed(tokens[i : i + 1]) for i in range(PROMPT, len(tokens))])


# --- state


def state_tests(models: Sequence[Path], pair: CachePair, on_device: bool = False) -> dict[str, dict[str, bool]]:
    """Upstream's test-save-load-state: model name -> sub-test -> passed. A process that died leaves {}.

    Two sub-tests copy a sequence on the device. At this pin that writes out of bounds for every block type, so that
    the process dies before the other sub-tests; therefore they run on the host path unless `on_device`.
    """
    environment = ENVIRONMENT if on_device else ENVIRONMENT | {"LD_PRELOAD": str(_host_path(models[0].parent.parent))}
    options = f"-ctk {pair.k} -ctv {pair.v} -t 1".split()

    def run(model: Path) -> dict[str, bool]:
        done = subprocess.run(
            [native.tool("test-save-load-state"), "--models", model.parent, *options],
            capture_output=True,
            text=True,
            env=environment,
            cwd=model.parent,
            check=False,
            timeout=120,
        )
        assert done.returncode in (0, 1) or done.returncode < 0, done.stderr
        header, _, row = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).partition("\n")
        results = re.findall("PASS|FAIL|SKIP", row)
        return {test: result == "PASS" for test, result in zip(header.split()[1:], results, strict=False)}

    with ThreadPoolExecutor(WORKERS) as pool:
        return {model.stem: result for model, result in zip(models, pool.map(run, models), strict=True)}


HOST_PATH = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
// The flags of test-save-load-state are 0 or LLAMA_STATE_SEQ_FLAGS_ON_DEVICE: always pass 0.
size_t llama_state_seq_get_size_ext(void * ctx, int32_t seq, uint32_t flags) {
    size_t (*next)(void *, int32_t, uint32_t) = dlsym(RTLD_NEXT, __func__);
    return next(ctx, seq, 0);
}
size_t llama_state_seq_get_data_ext(void * ctx, void * dst, size_t size, int32_t seq, uint32_t flags) {
    size_t (*next)(void *, void *, size_t, int32_t, uint32_t) = dlsym(RTLD_NEXT, __func__);
    return next(ctx, dst, size, seq, 0);
}
size_t llama_state_seq_set_data_ext(void * ctx, const void * src, size_t size, int32_t seq, uint32_t flags) {
    size_t (*next)(void *, const void *, size_t, int32_t, uint32_t) = dlsym(RTLD_NEXT, __func__);
    return next(ctx, src, size, seq, 0);
}
"""


@cache
def _host_path(folder: Path) -> Path:
    """A library to preload, which takes LLAMA_STATE_SEQ_FLAGS_ON_DEVICE out of every call."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler, "no C compiler"
    source, library = folder / "host_path.c", folder / "host_path.so"
    source.write_text(HOST_PATH)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True, timeout=60)
    return library


if __name__ == "__main__":
    import farm  # again, by the module name that pickled outcomes carry

    farm.work(*sys.argv[1:])
