#!/usr/bin/env bash
# Usage: tools/run_tests.sh [arguments of pytest]
# Style, types and the whole suite, in .venv, which it makes where it is not.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup_env.sh
# shellcheck disable=SC1091
source .venv/bin/activate
ruff check .
ruff format --check .
mypy
pytest "$@"
