#!/usr/bin/env bash
# Everything that CI checks: style, types, tests. Needs nothing but Python; makes the rest itself.
#
#   scripts/test.sh                 all tests but the slow ones
#   scripts/test.sh --all           the slow ones too
#   scripts/test.sh tests/test_x.py -k name         further arguments go to pytest
#
# Files of tests run side by side, KVC_TEST_WORKERS at a time (default: 2, on one core 1). Each takes
# up to 7 GB.
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
# A file's tests share engines, so it stays in one process. Files with engines come first: they take
# longest, and the quick ones fill what time is left.
PATH="$VENV/bin:$PATH" exec "$PYTHON" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder \
    "${selection[@]}" "${arguments[@]}"
