#!/usr/bin/env bash
# Usage: tools/run_tests.sh [arguments of pytest]
# Style, types and the whole suite in .venv, with OpenMMLab's packages; then the
# tests marked `host` in .venv-onedl, with their fork. Makes both environments
# where they are not. HOSTS=openmmlab or HOSTS=onedl does one of the two.
set -euo pipefail
cd "$(dirname "$0")/.."
HOSTS=${HOSTS:-openmmlab onedl}

if [[ " $HOSTS " == *" openmmlab "* ]]; then
    bash tools/setup_env.sh openmmlab
    # shellcheck disable=SC1091
    source .venv/bin/activate
    ruff check .
    ruff format --check .
    mypy
    pytest "$@"
fi
if [[ " $HOSTS " == *" onedl "* ]]; then
    bash tools/setup_env.sh onedl
    # shellcheck disable=SC1091
    source .venv-onedl/bin/activate
    echo "== With the onedl fork"
    # 5: the arguments select none of these
    pytest -m host "$@" || [ $? = 5 ]
fi
