#!/usr/bin/env bash
# Builds turbokv for the NVIDIA GPU of this machine, checks it, and times it. gpu.sh --help says more.

start=$PWD
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

usage() {
    cat <<'HELP'
Checks and times turbokv's CUDA kernels on this machine's NVIDIA GPU.

    scripts/gpu.sh [STEP] [options]      # check: does it compute the right thing? Then: how fast?

  check            device encoders and decoders bit for bit, operations against float64, llama.cpp's own
                   test-backend-ops, compute-sanitizer, KL divergence of GPU against CPU           (minutes)
  time             attention and SET_ROWS alone, every cache against f16                           (minutes)
  model            llama-bench on a random model of 8B shape, 32768 and 131072 tokens deep         (minutes, 5 GB)
  all              check, then time; and model with --model-bench                                  (the default)

  -o DIR           results: a line of JSON per command in STEP.jsonl, output in *.log   (results/cuda-<GPU name>)
  --prebuilt DIR   use the tools in DIR, such as build-cuda/bin of another machine, and build nothing
  --arch LIST      CMAKE_CUDA_ARCHITECTURES of the build                                (native)
  --device NAME    CUDA0, CUDA1, ..; CPU only tries out this script                     (CUDA0)
  --model FILE     the model for llama-bench, made when it is not there                 (build-cuda/random-8b.gguf)
  --model-bench    all includes model
  --quick          check without compute-sanitizer; time with fewer rounds

The checks run side by side; the first that fails ends them all. Building needs CUDA 12.4 or newer, CMake and ninja; see README.md.
HELP
}

step=all out='' prebuilt='' arch=native device=CUDA0 model='' model_bench='' quick=''
# A path given on the command line, as it is called from the project's folder.
path_here() {
    local project=$PWD
    (cd "$start" && realpath -m --relative-base="$project" -- "$1")
}
while [ $# -gt 0 ]; do
    case $1 in
        check | time | model | all) step=$1 ;;
        -o | --prebuilt | --arch | --device | --model)
            [ $# -ge 2 ] || fail "$1 needs a value; --help shows the options"
            case $1 in
                -o) out=$(path_here "$2") ;;
                --prebuilt) prebuilt=$(path_here "$2") ;;
                --arch) arch=$2 ;;
                --device) device=$2 ;;
                --model) model=$(path_here "$2") ;;
            esac
            shift ;;
        --model-bench) model_bench=1 ;;
        --quick) quick=1 ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument '$1'; --help shows what there is" ;;
    esac
    shift
done

# --- the machine

gpu=CPU driver=none cuda=none on_device=(-dev none)
if [ "$device" != CPU ]; then
    command -v nvidia-smi >/dev/null || fail "nvidia-smi is not on PATH: is there an NVIDIA GPU with its driver?"
    index=${device#CUDA}
    IFS=, read -r gpu driver < <(nvidia-smi -i "$index" --query-gpu=name,driver_version --format=csv,noheader) ||
        fail "nvidia-smi knows no GPU $index"
    driver=${driver# }
    cuda=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p') || true
    [ -n "$cuda" ] || cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9.]*\).*/\1/p')
    on_device=(-dev "$device" -ngl 99)
fi
commit=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
slug=$(tr 'A-Z ' 'a-z-' <<<"$gpu")
out=${out:-results/cuda-$slug}
mkdir -p "$out"
export gpu driver cuda commit

# --- the build

bin=$prebuilt
if [ -z "$prebuilt" ]; then
    bin=build-cuda/bin
    say "Building with CUDA for $arch in build-cuda/"
    cmake -S . -B build-cuda -G Ninja -DTURBOKV_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch" >"$out/configure.log" 2>&1 ||
        { tail -30 "$out/configure.log" >&2; fail "the build could not be configured; the reason is above"; }
    cmake --build build-cuda --target turbokv-tools turbokv-bench-cuda \
        test-turbokv-ops test-turbokv-cuda-golden test-backend-ops || fail "the build failed; the first error above is why"
fi
[ -x "$bin/llama-bench" ] || fail "no llama-bench in $bin"
model=${model:-build-cuda/random-8b.gguf}

# --- running and recording

# A line of JSON: what was run, where, and what came of it. record STEP NAME STATUS SECONDS RESULT-OR-EMPTY COMMAND..
record() {
    python3 - "$@" >>"$out/$1.jsonl" <<'PYTHON'
import datetime, json, os, shlex, sys
step, name, status, seconds, result, *command = sys.argv[1:]
line = {"step": step, "name": name, "status": status, "seconds": float(seconds), "command": shlex.join(command)}
line |= {key: os.environ[key] for key in ("gpu", "driver", "cuda", "commit")}
line["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
if result:
    line["result"] = [json.loads(text) for text in result.splitlines() if text.startswith(("{", "["))]
print(json.dumps(line))
PYTHON
}

# What is worth reading of a test's output.
shorten() { grep -Ev ': .*(OK|not supported)|CUDA graph warmup' || true; }

# run STEP NAME COMMAND..: output goes to NAME.log and the terminal; a failure ends the script.
run() {
    local step=$1 name=$2 began=$SECONDS code=0
    shift 2
    say "$name"
    "$@" 2>&1 | tee "$out/$name.log" | shorten || code=$?
    if [ "$code" != 0 ]; then
        record "$step" "$name" "failed ($code)" $((SECONDS - began)) '' "$@"
        fail "$name failed with $code (77: no such device); its output is in $out/$name.log"
    fi
    record "$step" "$name" ok $((SECONDS - began)) '' "$@"
}

# --- check

# beside NAME COMMAND..: in the background; its output goes to NAME.log.
declare -A beside_name=() beside_command=()
beside() {
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 </dev/null &
    beside_name[$!]=$name
    beside_command[$!]=$(printf '%q ' "$@")
}
stop_all() { [ ${#beside_name[@]} = 0 ] || kill "${!beside_name[@]}" 2>/dev/null || true; }
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Waits for all that run beside; the first failure ends the script, and with it the others.
wait_for_all() {
    local pid name code status began=$SECONDS
    while [ ${#beside_name[@]} -gt 0 ]; do
        code=0
        wait -n -p pid "${!beside_name[@]}" || code=$?
        name=${beside_name[$pid]} status=ok
        [ $code = 0 ] || status="failed ($code)"
        eval "record check '$name' '$status' $((SECONDS - began)) '' ${beside_command[$pid]}"
        unset "beside_name[$pid]"
        say "$name: $status"
        shorten <"$out/$name.log" | tail -n 15
        [ $code = 0 ] || fail "$name failed with $code (77: no such device); its output is in $out/$name.log"
    done
}

# Mean KL divergence and its error, from the output of llama-perplexity.
mean_kld() { sed -n 's/^Mean *KLD: *\([-0-9.]*\) ± *\([-0-9.]*\).*/\1 \2/p' "$1"; }

# The same cache on the CPU and on the GPU, against f16 on the CPU. The two may differ by what their errors allow, and by
# what f16 on the GPU differs from f16 on the CPU.
check_kld() {
    local data=python/turbokv/data cache k v where flags floor=0 base
    base=$(mktemp)
    local perplexity=("$bin/llama-perplexity" -m "$data/mini-q8_0.gguf" -f "$data/sample.txt" -c 512 --chunks 16 -fa on)
    run check kld-base "${perplexity[@]}" -dev none --kl-divergence-base "$base"
    for cache in f16 turbo3 turbo4 tbq3 q8_0/turbo3; do
        k=${cache%/*} v=${cache#*/}
        for where in cpu gpu; do
            flags=(-dev none)
            [ $where = cpu ] || flags=("${on_device[@]}")
            run check "kld-${cache/\//-}-$where" "${perplexity[@]}" "${flags[@]}" -ctk "$k" -ctv "$v" \
                --kl-divergence --kl-divergence-base "$base" >/dev/null
        done
        local cpu gpu_kld verdict
        cpu=$(mean_kld "$out/kld-${cache/\//-}-cpu.log")
        gpu_kld=$(mean_kld "$out/kld-${cache/\//-}-gpu.log")
        verdict=$(awk -v floor="$floor" '{
            limit = 2 * sqrt($2 ^ 2 + $4 ^ 2) + floor; d = $3 > $1 ? $3 - $1 : $1 - $3
            if (NF != 4) print "no numbers"; else print (d <= limit ? "ok" : "differ") }' <<<"$cpu $gpu_kld")
        if [ "$cache" = f16 ]; then
            floor=${gpu_kld%% *}
            verdict=$(awk -v floor="$floor" 'BEGIN { print (floor < 0.005 ? "ok" : "differ") }')
        fi
        echo "mean KLD of $cache: CPU $cpu, GPU $gpu_kld: $verdict"
        record check "kld $cache" "$verdict" 0 "{\"cpu\": [${cpu/ /, }], \"gpu\": [${gpu_kld/ /, }], \"f16_gpu\": $floor}" kld
        [ "$verdict" = ok ] || fail "the GPU's KL divergence of $cache is not the CPU's; f16 on the GPU: $floor"
    done
    rm -f "$base"
}

check() {
    say "checks, side by side"
    beside golden "$bin/test-turbokv-cuda-golden" tests/golden --device "$device"
    beside ops "$bin/test-turbokv-ops" --device "$device"
    beside backend-ops "$bin/test-backend-ops" test -b "$device" -p 'turbo|tbq' \
        -o GET_ROWS,SET_ROWS,CPY,MUL_MAT,FLASH_ATTN_EXT
    if [ -n "$quick" ] || ! command -v compute-sanitizer >/dev/null; then
        echo "skipped: compute-sanitizer (--quick, or not on PATH)"
        record check sanitizer skipped 0 ''
    else
        # Upstream tries to update a CUDA graph and makes another when that fails: an error of the API, not of memory.
        beside memcheck compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
            "$bin/test-turbokv-ops" --device "$device" --every 53
        # Of other kernels it would watch upstream's matrix products for many minutes. Every 129th case has one of
        # those in which shared memory is used again.
        beside racecheck compute-sanitizer --tool racecheck --kernel-name kns=flash_attn_decode --error-exitcode 1 \
            "$bin/test-turbokv-ops" --device "$device" --every 129
    fi
    wait_for_all
    # With its hooks lost upstream's test would pass: it would not know our types.
    local cases
    cases=$(sed -n 's|.* \([0-9]*\)/\1 tests passed.*|\1|p' "$out/backend-ops.log" | tail -1)
    [ "${cases:-0}" -ge 1000 ] || fail "test-backend-ops had only ${cases:-no} cases of our types; see $out/backend-ops.log"
    check_kld
}

# --- time

# bench NAME OPTIONS..
bench() {
    local name=$1 result began=$SECONDS
    shift
    local command=("$bin/turbokv-bench-cuda" --device "$device" --json "$@")
    [ -z "$quick" ] || command+=(--rounds 5)
    say "$name: turbokv-bench-cuda $*"
    result=$("${command[@]}") || fail "$name failed; its message is above"
    record time "$name" ok $((SECONDS - began)) "$result" "${command[@]}"
    python3 - "$result" <<'PYTHON'
import json, sys
run = json.loads(sys.argv[1])
print(f"copy {run['copy_GB_per_s']:.0f} GB/s; cache, us/op, times f16's time, GB/s, share of the copy's")
for c in run["caches"]:
    ratio = f"{c['ratio_to_f16']:.3f}" if c["ratio_to_f16"] else "-"
    print(f"  {c['cache']:14} {c['us']:10.2f} {ratio:>7} {c['GB_per_s']:7.0f} {100 * c['share_of_copy']:6.1f} %")
PYTHON
}

time_kernels() {
    local heads depth batch
    for heads in 32 64; do   # 4 and 8 query heads per KV head
        for depth in 32768 131072; do
            bench "decode-$heads-$depth" --heads $heads --depth $depth
            bench "decode-$heads-$depth-8seqs" --heads $heads --depth $depth --seqs 8
        done
    done
    for batch in 2 4 8 16; do
        bench "batch-$batch" --batch $batch
    done
    bench prefill --batch 4096 --rounds 5 --ms 50
    for batch in 1 512 4096; do
        bench "set-rows-$batch" --op set-rows --batch $batch
    done
}

# --- model

bench_model() {
    [ -f "$model" ] || run model make-model python3 scripts/make_model.py -o "$model"
    local what cache result began
    for what in "-d 32768 -p 512 -n 64 -r 2" "-d 131072 -p 0 -n 64 -r 1"; do   # filling 131072 cells takes most of it
        for cache in f16 turbo3 q8_0 q4_0; do
            # shellcheck disable=SC2086  # $what is options
            local command=("$bin/llama-bench" -m "$model" "${on_device[@]}" -fa 1 -ctk "$cache" -ctv "$cache" $what -o jsonl)
            say "llama-bench $cache $what"
            began=$SECONDS
            result=$("${command[@]}" 2>"$out/llama-bench-$cache.log") ||
                fail "llama-bench failed; see $out/llama-bench-$cache.log"
            record model "$cache" ok $((SECONDS - began)) "$result" "${command[@]}"
            python3 - "$result" <<'PYTHON'
import json, sys
for run in map(json.loads, sys.argv[1].splitlines()):
    what = f"generation at {run['n_depth']}" if run["n_gen"] else f"prompt at {run['n_depth']}"
    print(f"  {what:24} {run['avg_ts']:10.1f} +- {run['stddev_ts']:.1f} tokens/s")
PYTHON
        done
    done
}

echo "$gpu, driver $driver, CUDA $cuda, turbokv $commit; results in $out"
case $step in
    check) check ;;
    time) time_kernels ;;
    model) bench_model ;;
    all)
        check
        time_kernels
        if [ -n "$model_bench" ]; then bench_model; else echo "llama-bench: only with --model-bench"; fi ;;
esac
say "Done: $out"
