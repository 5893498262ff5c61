#!/usr/bin/env bash
# mypy, strict, over everything. kernels/ is read under the name it is imported by
# (kvcompress_kernels), through the link that scripts/setup_env.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
paths=(scripts tests "$VENV/mypy_path/kvcompress_kernels")
for folder in vllm_kvcompress benchmarks; do
    if [[ -d "$folder" ]]; then paths+=("$folder"); fi
done
MYPYPATH="$VENV/mypy_path" exec "$VENV/bin/mypy" "${paths[@]}"
