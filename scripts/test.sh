#!/usr/bin/env bash
# Everything that CI checks: style, types, tests. Needs nothing but Python; makes the rest itself.
#
#   scripts/test.sh                 all tests but the slow ones
#   scripts/test.sh --all           the slow ones too
#   scripts/test.sh tests/test_x.py -k name         further arguments go to pytest
#
# The tests of what needs no vLLM run first, with vLLM blocked from import, and then the others; with
# further arguments all run together. They run in KVC_TEST_WORKERS processes side by side (default:
# 2, on one core 1), each of which takes up to 8 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --all ]]; then selection=(); else arguments+=("$argument"); fi
done

"$PYTHON" scripts/fetch_model.py smollm2-135m-instruct
"$PYTHON" scripts/fetch_model.py qwen2.5-coder-0.5b-instruct
"$PYTHON" scripts/fetch_model.py gemma-3-270m
"$PYTHON" scripts/fetch_ruler.py

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
scripts/typecheck.sh

# The tests start engines and servers of their own; none of them may look for a hub or send
# anything anywhere.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export TOKENIZERS_PARALLELISM=false
# More threads than one spin while they wait for each other and slow small models down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cores="$(env -u OMP_NUM_THREADS nproc)" # it would obey the variable
workers="${KVC_TEST_WORKERS:-$((cores < 2 ? 1 : 2))}"
# Files that share engines or a server share a process, and those that take longest come first
# (tests/support/worker_groups.py).
run_tests() {
    PATH="$VENV/bin:$PATH" "$PYTHON" -m pytest -n "$workers" --dist loadscope \
        --no-loadscope-reorder "${selection[@]}" "$@"
}

if ((${#arguments[@]})); then
    run_tests "${arguments[@]}"
    exit
fi
# What needs no vLLM passes where there is none.
without_vllm=(tests/methods tests/paging tests/planning tests/eviction tests/kernels)
status=0
run_tests -p tests.support.vllm_blocked "${without_vllm[@]}" || status=$?
run_tests "${without_vllm[@]/#/--ignore=}" || status=$?
exit "$status"
