#!/usr/bin/env bash
# Runs every check on a machine without a GPU: generated files, formats, types, C tests (ctest), Python tests (pytest).
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
find ggml-ext tests/c scripts -name generated -prune -o -name '*.[ch]' -print -o -name '*.cpp' -print | xargs clang-format --dry-run --Werror

failed=0
say "C tests"
ctest --test-dir build --output-on-failure -LE slow || failed=1
say "Python tests"
pytest "$@" || failed=1
exit $failed
