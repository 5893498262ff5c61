#!/usr/bin/env bash
# Makes the virtual environment of the comparison with kvpress (docs/kvpress.md): kvpress wants an
# older transformers than vLLM, so it gets a place of its own, without vLLM, with this package in
# editable mode. Quick when nothing has changed.
#
#   scripts/setup_kvpress_env.sh        VENV=/elsewhere scripts/setup_kvpress_env.sh
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$REPO/.venv-kvpress}"
PYTHON="$VENV/bin/python"
LOG="$VENV/setup_kvpress_env.log"

# What the numbers depend on; pip finds the rest of what kvpress asks for.
TORCH='torch==2.13.0'
PACKAGES=(
    'kvpress==0.5.5' 'transformers==5.2.0' 'tokenizers==0.22.2' 'huggingface_hub==1.33.0'
    'accelerate==1.15.0' 'datasets==5.2.0' 'fire==0.6.0' 'numpy==2.3.5' 'pandas==2.3.3'
    'peft==0.21.2'
)
# What this package needs besides, and its tests.
PACKAGES+=('rich>=13' 'tqdm>=4.66' 'pytest==9.2.0')
# What makes RULER's prompts and draws the plots.
PACKAGES+=('matplotlib>=3.9' 'nltk>=3.9' 'pyyaml>=6' 'scipy>=1.13' 'tenacity>=9' 'wonderwords>=3')

say() { printf 'setup_kvpress_env: %s\n' "$1" >&2; }

fail() {
    say "$1"
    exit 1
}

# pip's words go to a log and are shown only when it fails.
run_pip() {
    "$PYTHON" -m pip "$@" >>"$LOG" 2>&1 && return
    tail -n 25 "$LOG" >&2
    fail "'pip $1' failed, see the lines above and $LOG."
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate lacks venv: install your system's python3-venv package."
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and no python3 on PATH is that new."
}

# The builds for Linux that carry no CUDA have this local version; other systems have no CUDA ones.
install_torch() {
    local torch="$TORCH"
    if [[ "$(uname -s)" == Linux ]]; then torch="$TORCH+cpu"; fi
    "$PYTHON" -m pip install "$torch" >>"$LOG" 2>&1 ||
        fail "pip finds no $torch: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels."
}

main() {
    local stamp="$VENV/.setup_kvpress_env" want base
    want="$({
        cat "$REPO/setup.py" "$REPO/scripts/setup_kvpress_env.sh"
        printf '%s\n' "$REPO"
    } | sha256sum | cut -d' ' -f1)"
    if [[ -x "$PYTHON" && "$(cat "$stamp" 2>/dev/null)" == "$want" ]]; then return; fi

    if [[ ! -x "$PYTHON" ]]; then
        base="$(find_python)"
        say "creating $VENV"
        "$base" -m venv "$VENV" || fail "'$base -m venv $VENV' failed."
    fi
    # A half-made environment must not pass for a whole one.
    rm -f "$stamp"
    : >"$LOG"

    say "installing torch and kvpress (minutes the first time)"
    install_torch
    run_pip install "${PACKAGES[@]}"

    say "installing vllm_kvcompress, without vLLM"
    run_pip install 'setuptools>=77,<81' wheel
    run_pip install --no-build-isolation --no-deps -e "$REPO"

    say "checking that kvpress and the comparison import"
    "$PYTHON" -c 'import kvpress, vllm_kvcompress.tools.evaluation.kvpress_backend' >>"$LOG" 2>&1 ||
        fail "'import kvpress, vllm_kvcompress.tools.evaluation.kvpress_backend' fails, see $LOG."
    printf '%s\n' "$want" >"$stamp"
    say "done: $VENV"
}

main
