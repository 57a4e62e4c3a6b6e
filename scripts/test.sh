#!/usr/bin/env bash
# Runs every check on a machine without a GPU: generated files, formats, types, CUDA kernels (compiled only, where nvcc is),
# C tests (ctest), Python tests (pytest).
# Arguments go to pytest: scripts/test.sh -m 'not upstream' also runs the slow tests, as CI does; some want WikiText-2 in
# ../shared/eval. Not run here: the whole matrix of operations, an hour on two cores (ctest --test-dir build -L slow).

source "$(dirname "$0")/common.sh"

setup_system
setup_venv "[dev]"
setup_build all

say "Generated files, formats, types"
python scripts/generate.py --check
ruff check .
ruff format --check .
mypy
find cuda ggml-ext tests/c tests/cuda scripts -name generated -prune -o -name '*.[ch]' -print -o -name '*.cpp' -print -o -name '*.cu*' -print |
    xargs clang-format --dry-run --Werror

say "CUDA kernels"
PATH=$PATH:/usr/local/cuda/bin   # where NVIDIA installs it
if command -v nvcc >/dev/null; then   # compiled for one GPU, not run: scripts/gpu.sh does that
    mkdir -p build-cuda-check
    cmake -S . -B build-cuda-check -G Ninja -DPython3_EXECUTABLE="$PWD/.venv/bin/python" -DTURBOKV_CUDA=ON \
        -DCMAKE_CUDA_ARCHITECTURES=90a-real -DTURBOKV_LLAMA_SOURCE="${TURBOKV_LLAMA_SOURCE:-}" >build-cuda-check/configure.log 2>&1 ||
        { cat build-cuda-check/configure.log >&2; fail "the CUDA build could not be configured; the reason is above"; }
    cmake --build build-cuda-check --target turbokv-cuda
else
    echo "not compiled: no nvcc on PATH"
fi

failed=0
say "C tests"
ctest --test-dir build --output-on-failure -LE slow || failed=1
say "Python tests"
pytest "$@" || failed=1
exit $failed
