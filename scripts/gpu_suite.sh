#!/usr/bin/env bash
# Everything that is measured on a machine with a GPU, in less than ten minutes.
#
#   scripts/gpu_suite.sh              kernel tests and kernel benchmarks: needs Python with torch,
#                                     Triton, numpy, pytest, hypothesis; no vLLM, not this package
#   scripts/gpu_suite.sh --engine     real engines too, checked before the kernels and timed after
#                                     them: needs vLLM, installed or packed
#   scripts/gpu_suite.sh --pack DIR   where there is a network: packs vLLM for a machine that has
#                                     PyTorch but no vLLM (docs/gpu-suite.md)
#
#   --out DIR     where the CSVs go instead of benchmarks/results
#   --packed DIR  where --pack has left vLLM instead of build/gpu-pack; used if none is installed
#   --only PART   engine, kernels or speed alone
#   --quick       two checks of engines, one backend
#   --cpu         checks this script: interpreted kernels, small benchmarks, the CSVs in build/
#   PYTHON=/some/python scripts/gpu_suite.sh
#
# Figures are appended to kernels_<device>.csv, and with --engine to gpu_<device>.csv, which has all
# of them. Ends with an error if anything failed or ran out of time; the rest is run and written all
# the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BENCHMARKS=(scoring selection compaction page_tables pipeline decode_attention)
PYTHON="${PYTHON:-python3}"
cpu=false engine=false quick=false
only="" out="" packed=build/gpu-pack
while (($#)); do
    case "$1" in
        --cpu) cpu=true ;;
        --engine) engine=true ;;
        --quick) quick=true ;;
        --pack) exec "$PYTHON" -m benchmarks.gpu_engine.pack "${@:2}" ;;
        --out | --packed | --only)
            declare "${1#--}=${2:?$1 needs a value}"
            shift
            ;;
        *)
            printf 'gpu_suite: unknown option %s\n' "$1" >&2
            exit 2
            ;;
    esac
    shift
done
# Seconds from the start by which each part must have ended.
if $engine; then
    ENGINES_END=270 TESTS_END=360 BENCHMARKS_END=470 SECONDS_PER_BENCHMARK=25 ALL_END=570
else
    ENGINES_END=0 TESTS_END=285 BENCHMARKS_END=570 SECONDS_PER_BENCHMARK=70 ALL_END=570
fi

options=()
if $cpu; then
    # More threads than one spin while they wait for each other.
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    options=(--quick --device cpu)
    ENGINES_END=1800 ALL_END=2400
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    printf 'gpu_suite: torch sees no GPU here (--cpu checks the script without one).\n' >&2
    exit 1
fi
out="${out:-$($cpu && echo build || echo benchmarks/results)}"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHON work PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"

slug="$("$PYTHON" - <<'PY'
import re, torch
from benchmarks.kernel_bench import device_name
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-"))
PY
)"
mkdir -p "$out"
csv="$out/kernels_$slug.csv"
all_csv="$out/gpu_$slug.csv"
failed=()

wanted() { [[ -z "$only" || "$only" == "$1" ]]; }

engines() {
    local arguments=(--csv "$all_csv" "$@")
    if $cpu; then arguments+=(--cpu); fi
    if $quick; then arguments+=(--quick); fi
    PYTHONPATH="$PYTHONPATH:$work/site" "$PYTHON" -m benchmarks.gpu_engine.suite "${arguments[@]}"
}

if $engine && ! "$PYTHON" -c 'import sys; from importlib.util import find_spec as f
sys.exit(f("vllm") is None)'; then
    if [[ ! -e "$packed/engine.tar.xz" ]]; then
        printf 'gpu_suite: no vLLM: install it, or see --pack.\n' >&2
        exit 1
    fi
    "$PYTHON" -c 'import sys; from pathlib import Path
from benchmarks.gpu_engine.pack import unpack
unpack(Path(sys.argv[1]), Path(sys.argv[2]))' "$packed/engine.tar.xz" "$work/site"
    printf '== unpacked vLLM by second %d\n' "$SECONDS"
fi
if $engine && wanted engine; then
    engines --seconds $((ENGINES_END - SECONDS)) || failed+=(engines)
    printf '== engines ended at second %d\n' "$SECONDS"
fi

# Compiling takes longer than running, so the files share the cores.
run_tests() {
    local name log status=0
    name="$(basename "$1" .py)"
    log="$work/$name.log"
    timeout --kill-after=5 "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "$1" >"$log" 2>&1 ||
        status=$?
    # 124 and 137 are timeouts.
    printf '== %s: status %d\n%s\n' "$name" "$status" "$(tail -n 40 "$log")"
    return "$status"
}
export -f run_tests

if wanted kernels; then
    limit=$((TESTS_END - SECONDS))
    # shellcheck disable=SC2016  # the inner shell expands them
    if ! printf '%s\0' tests/kernels/test_*.py |
        xargs -0 -P "$(nproc)" -I{} bash -c 'run_tests "$1" "$2" || exit 1' - {} \
            $((limit < 60 ? 60 : limit)); then
        failed+=(tests)
    fi
    printf '== tests ended at second %d\n' "$SECONDS"

    for name in "${BENCHMARKS[@]}"; do
        left=$((BENCHMARKS_END - SECONDS))
        limit=$((left < SECONDS_PER_BENCHMARK ? left : SECONDS_PER_BENCHMARK))
        printf '== bench_%s\n' "$name"
        if ((limit < 5)) || ! timeout --kill-after=5 "$limit" \
            "$PYTHON" -m "benchmarks.bench_$name" --csv "$work/kernels.csv" "${options[@]}"; then
            failed+=("bench_$name")
        fi
    done
    if [[ -e "$work/kernels.csv" ]]; then
        tail -n "+$([[ -e "$csv" ]] && echo 2 || echo 1)" "$work/kernels.csv" >>"$csv"
    fi
fi
# The stand-in for the device cannot hold a plain and a compressed engine at once.
if $engine && wanted speed && ! $cpu; then
    engines --speed --seconds $((ALL_END - SECONDS)) || failed+=(speed)
fi
if $engine; then
    PYTHONPATH="$PYTHONPATH:$work/site" "$PYTHON" -m benchmarks.gpu_engine.results \
        --csv "$all_csv" --kernels "$work/kernels.csv" --failed "${failed[@]}"
fi

printf '== %d s; figures in %s\n' "$SECONDS" "$out"
if ((${#failed[@]})); then
    printf 'gpu_suite: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
