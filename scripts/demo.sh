#!/usr/bin/env bash
# A real model answers a question about a long text from a compressed cache, and says what it cost.
#
#   scripts/demo.sh [--model NAME|FOLDER|HUB_ID] [--method cake] [--budget 1024]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

exec "$PYTHON" scripts/demo.py "$@"
