#!/usr/bin/env bash
# Usage: tools/setup_env.sh
# Makes .venv with pinned versions of everything, or finds that it is there.
# PYTHON names the interpreter to use (default python3.11).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
# what was installed from, so that a change of it installs anew
stamp=$(cat requirements/*.txt setup.py tools/setup_env.sh | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
if ! command -v "$PYTHON" >/dev/null; then
    echo "$PYTHON was not found: install Python 3.11, or name one with" \
         "PYTHON=..." >&2
    exit 1
fi
if ! command -v c++ >/dev/null; then
    echo "c++ was not found: MMCV is built here, install a C++ compiler" >&2
    exit 1
fi

echo "== Making .venv"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
# every package, whoever asks for it, in the version that is tested
export PIP_CONSTRAINT=$PWD/requirements/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip install --quiet -r requirements/build.txt
echo "== Installing torch"
pip install --quiet -r requirements/runtime.txt

export MMCV_WITH_OPS=1 FORCE_CUDA=0
mmcv_options=()
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    if command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; then
        export FORCE_CUDA=1
        # pip may have cached a build without CUDA
        mmcv_options=(--no-cache-dir)
    else
        echo "== There is a GPU but no nvcc: MMCV's ops are built for the CPU"
    fi
fi
if ! python -c 'import mmcv._ext' 2>/dev/null; then
    echo "== Building MMCV: some 10 minutes on 2 cores, unless pip has it cached"
    pip install --quiet --no-build-isolation "${mmcv_options[@]}" \
        "$(grep '^mmcv==' requirements/openmmlab.txt)"
fi
echo "== Installing MMDetection, MMSegmentation and mmagvm"
pip install --quiet --no-build-isolation -e '.[openmmlab,optimizers,tools,tests]'
echo "$stamp" > .venv/installed
