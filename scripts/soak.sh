#!/usr/bin/env bash
# An hour of mixed traffic against a real server, every answer compared with the same request alone.
#
#   scripts/soak.sh                     an hour; the report is in out/soak/
#   scripts/soak.sh --minutes 10 --seed 7
#   scripts/soak.sh --plain             the same traffic for plain vLLM
#
# Exit code 1 on any fault. CONTRIBUTING.md says what is watched; --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

"$PYTHON" scripts/fetch_model.py smollm2-135m-instruct

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export TOKENIZERS_PARALLELISM=false
# More threads than one spin while they wait for each other and slow small models down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m benchmarks.soak "$@"
