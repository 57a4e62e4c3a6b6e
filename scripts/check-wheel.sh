#!/usr/bin/env bash
# Builds the wheel as `pip install .` does, installs it into a fresh environment outside the checkout and uses it.

source "$(dirname "$0")/common.sh"

setup_system
setup_venv "[dev]"
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1 CC=cc CXX=c++   # the compiler names of build/, for ccache
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say "Building the wheel"
# build-wheel stands beside build/, so that ccache sees the same relative paths.
.venv/bin/python -m pip wheel . --no-deps --wheel-dir "$scratch" --config-settings build-dir=build-wheel
ls -l "$scratch"/*.whl

say "Using it from an environment of its own"
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check "$scratch"/*.whl
pinned=$(echo "$PWD"/build-wheel/upstream/*/vendor/llama.cpp)
cd "$scratch"
venv/bin/turbokv doctor
venv/bin/turbokv doctor --llama-source "$pinned"
venv/bin/turbokv needle --lengths 256 --depths 50 --distractors 1 --seeds 1 --cache turbo3
venv/bin/turbokv sweep -m mini --task kld --ctx 2048 --cache f16,turbo3 -o sweep
venv/bin/turbokv report sweep -o report.html
venv/bin/turbokv recommend -m mini --ctx 2048 --memory 100MiB --results sweep
if find venv -name 'libllama*' -o -name 'libggml-base*' | grep -v turbokv/_native; then
    fail "a second llama.cpp was installed"
fi
