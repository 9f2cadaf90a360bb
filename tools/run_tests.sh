#!/usr/bin/env bash
# Usage: tools/run_tests.sh [--fast] [arguments of pytest]
# Style, types and the whole suite in .venv, with OpenMMLab's packages. Makes
# the environment if it is missing. --fast skips the tests marked `slow`.
# HOSTS="openmmlab onedl" also runs the tests marked `host` in .venv-onedl, with
# the onedl forks; HOSTS=onedl runs only these. JOBS (2) tests run in parallel.
set -euo pipefail
cd "$(dirname "$0")/.."
HOSTS=${HOSTS:-openmmlab}
options=(-n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --fast ]; then
    shift
    HOSTS=openmmlab
    options+=(-m "not slow")
fi
# tests start processes of their own; each takes one thread
export OMP_NUM_THREADS=1

echo "On 2 cores this takes about:"
if [[ " $HOSTS " == *" openmmlab "* ]]; then
    echo "  14 min   style, types and all tests in .venv (OpenMMLab's packages)"
fi
if [[ " $HOSTS " == *" onedl "* ]]; then
    echo "  5 min    the tests marked host in .venv-onedl (the onedl forks)"
fi
echo "  2 min    to install each the first time, and 10 more to build MMCV"

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
    echo "== With the onedl forks"
    # 5: the arguments select none of these
    pytest "${options[@]}" -m host "$@" || [ $? = 5 ]
fi
