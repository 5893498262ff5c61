#!/usr/bin/env bash
# mypy, strict, over everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${VENV:-.venv}/bin/mypy" scripts tests kernels vllm_kvcompress benchmarks
