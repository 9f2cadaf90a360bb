#!/usr/bin/env bash
# Usage: tools/setup_env.sh [openmmlab | onedl]
# Makes an environment with pinned versions of everything, or finds that it is
# there: .venv with OpenMMLab's packages, or .venv-onedl with their fork.
# PYTHON names the interpreter to use (default python3.11).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
HOST=${1:-openmmlab}
case $HOST in
openmmlab) VENV=.venv ;;
onedl) VENV=.venv-onedl ;;
*)
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
# what was installed from, so that a change of it installs anew
stamp=$(cat requirements/{build,constraints,docs,optimizers,runtime,tests,tools,"$HOST"}.txt \
    pyproject.toml setup.py tools/pyproject.toml tools/setup_env.sh | sha256sum)
if [ "$(cat $VENV/installed 2>/dev/null)" = "$stamp" ]; then
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

echo "== Making $VENV"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
# shellcheck disable=SC1090,SC1091
source $VENV/bin/activate
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
        "$(grep -E '^(onedl-)?mmcv==' "requirements/$HOST.txt")"
fi
echo "== Installing MMDetection, MMSegmentation and mmagvm"
pip install --quiet --no-build-isolation \
    -e ".[$HOST,optimizers,tools,tests,docs]" -e tools
# for one test, out of MMEngine's sight: PyPI's is built for torch with CUDA, and
# a torchvision whose import fails ends each of its runs
pip install --quiet --no-deps --upgrade --target $VENV/torchvision torchvision
echo "$stamp" > $VENV/installed
