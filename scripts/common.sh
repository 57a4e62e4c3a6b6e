# Set-up shared by demo.sh and test.sh: tools, .venv, build. Sourced, not run.
#
# Needs root for one thing only: a compiler and Python's venv module, where the machine lacks them. Everything
# else goes into .venv and build/ of this folder, and ~/.cache/turbokv (the fetched llama.cpp release).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say()  { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { printf 'turbokv: %s\n' "$*" >&2; exit 1; }

python_is_new_enough() { python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Installs Debian packages, or says which ones and why.
need_packages() {
    local why=$1; shift
    command -v apt-get >/dev/null || fail "$why. Install the equivalent of: $*"
    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "$why, and installing needs root. Run: sudo apt-get install $*"
        sudo=(sudo)
    fi
    say "$why: installing $*"
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        fail "apt-get could not install $*; its message is above"
}

setup_system() {
    if ! command -v c++ >/dev/null || ! command -v cc >/dev/null; then
        need_packages "llama.cpp is C and C++, and there is no compiler" gcc g++ libc6-dev
    fi
    if ! command -v python3 >/dev/null || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        need_packages "the driver is Python and gets a virtual environment" python3 python3-venv
    fi
    python_is_new_enough || fail "Python 3.11 or newer is needed, this is $(python3 --version 2>&1)"
    local free_mb
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge 1500 ] || [ -f build/build.ninja ] ||
        fail "build/ and .venv/ take up to 1.5 GB, and only $free_mb MB are free in $PWD. Free some space and run this again"
}

# setup_venv EXTRAS: .venv with our package (editable) and its dependencies. Skipped while nothing it depends on has
# changed: pyproject.toml, the Python, and the place, which an environment cannot be moved from.
setup_venv() {
    local stamp
    stamp=.venv/turbokv-$({ cat pyproject.toml; echo "$1 $PWD"; python3 --version; } | sha256sum | cut -c1-16)
    [ -f "$stamp" ] && return
    say "Python environment in .venv"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
    local tools=(scikit-build-core)
    command -v cmake >/dev/null || tools+=(cmake)
    command -v ninja >/dev/null || tools+=(ninja)
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${tools[@]}"
    # Only the Python part: the native part is built below, in build/, where progress can be seen.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
        --config-settings wheel.cmake=false --editable ".$1"
    touch "$stamp"
}

# Threads that wait without spinning: several times faster where the cores are shared, and here they may be.
export OMP_WAIT_POLICY=passive

# setup_build TARGET: configures and builds in build/. With ccache, which llama.cpp's build uses when it finds it,
# objects are shared between clones. TURBOKV_LLAMA_SOURCE in the environment builds on that tree.
setup_build() {
    export PATH="$PWD/.venv/bin:$PATH" CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
    say "Building llama.cpp with the turbokv types in build/ (about 15 CPU-minutes the first time)"
    mkdir -p build
    if ! cmake -S . -B build -G Ninja -DPython3_EXECUTABLE="$PWD/.venv/bin/python" \
            -DTURBOKV_LLAMA_SOURCE="${TURBOKV_LLAMA_SOURCE:-}" 2>&1 | tee build/configure.log | grep --line-buffered turbokv:; then
        cat build/configure.log >&2
        fail "the build could not be configured; the reason is above (a build/ of another generator: delete it)"
    fi
    cmake --build build --target "$1" || fail "the build failed; the first error above is the cause"
}
