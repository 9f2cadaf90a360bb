#!/usr/bin/env bash
# Usage: tools/run_tests.sh [--fast] [arguments of pytest]
# Style, types and the whole suite in .venv, with OpenMMLab's packages; then the
# tests marked `host` in .venv-onedl, with their fork. Makes both environments
# where they are not. --fast leaves out the tests marked `slow`, and the fork.
# HOSTS=openmmlab or HOSTS=onedl does one of the two; JOBS (2) run side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
HOSTS=${HOSTS:-openmmlab onedl}
options=(-n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --fast ]; then
    shift
    HOSTS=openmmlab
    options+=(-m "not slow")
fi
# tests start processes of their own; each takes one thread
export OMP_NUM_THREADS=1

if [[ " $HOSTS " == *" openmmlab "* ]]; then
    bash tools/setup_env.sh openmmlab
    # shellcheck disable=SC1091
    source .venv/bin/activate
    ruff check .
    ruff format --check .
    mypy
    pytest "${options[@]}" "$@"
fi
if [[ " $HOSTS " == *" onedl "* ]]; then
    bash tools/setup_env.sh onedl
    # shellcheck disable=SC1091
    source .venv-onedl/bin/activate
    echo "== With the onedl fork"
    # 5: the arguments select none of these
    pytest "${options[@]}" -m host "$@" || [ $? = 5 ]
fi
