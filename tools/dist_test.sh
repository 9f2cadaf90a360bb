#!/usr/bin/env bash
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR
# and PORT in the environment. Without GPUs, GPUS counts gloo ranks.
# TIMEOUT (600): seconds that nodes and ranks wait for each other at the start.
set -e

if [ $# -lt 3 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
# shellcheck source=tools/dist_common.sh
source "$(dirname "$0")/dist_common.sh"

start_ranks "$3" -- test.py "$1" "$2" --launcher pytorch "${@:4}"
