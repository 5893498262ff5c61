#!/usr/bin/env bash
# Kernel tests and kernel benchmarks on a machine with a GPU, in less than ten minutes. Needs
# Python with torch, Triton, numpy, pytest and hypothesis; neither vLLM nor this package.
#
#   scripts/gpu_suite.sh              PYTHON=/some/python scripts/gpu_suite.sh
#   scripts/gpu_suite.sh --out DIR    where the CSV goes instead of benchmarks/results
#   scripts/gpu_suite.sh --cpu        checks this script: interpreted kernels, small benchmarks,
#                                     the CSV in build/
#
# Figures are appended to kernels_<device>.csv. Ends with an error if a test or a benchmark failed
# or ran out of time; the others are run and written all the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly SECONDS_IN_ALL=570 SECONDS_PER_BENCHMARK=70
readonly BENCHMARKS=(scoring selection compaction page_tables pipeline decode_attention)
PYTHON="${PYTHON:-python3}"
cpu=false
out=""
while (($#)); do
    case "$1" in
        --cpu) cpu=true ;;
        --out)
            out="${2:?--out needs a folder}"
            shift
            ;;
        *)
            printf 'gpu_suite: unknown option %s\n' "$1" >&2
            exit 2
            ;;
    esac
    shift
done

options=()
if $cpu; then
    # More threads than one spin while they wait for each other.
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    options=(--quick --device cpu)
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

# Compiling takes longer than running, so the files share the cores. Half of the time is theirs.
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

failed=()
# shellcheck disable=SC2016  # the inner shell expands them
if ! printf '%s\0' tests/kernels/test_*.py |
    xargs -0 -P "$(nproc)" -I{} bash -c 'run_tests "$1" "$2" || exit 1' - {} \
        $((SECONDS_IN_ALL / 2)); then
    failed+=(tests)
fi
printf '== tests took %d s\n' "$SECONDS"

for name in "${BENCHMARKS[@]}"; do
    left=$((SECONDS_IN_ALL - SECONDS))
    limit=$((left < SECONDS_PER_BENCHMARK ? left : SECONDS_PER_BENCHMARK))
    printf '== bench_%s\n' "$name"
    if ((limit < 5)) || ! timeout --kill-after=5 "$limit" \
        "$PYTHON" -m "benchmarks.bench_$name" --csv "$csv" "${options[@]}"; then
        failed+=("bench_$name")
    fi
done

printf '== %d s; figures in %s\n' "$SECONDS" "$csv"
if ((${#failed[@]})); then
    printf 'gpu_suite: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
