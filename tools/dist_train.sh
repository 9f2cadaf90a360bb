#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR
# and PORT in the environment. Without GPUs, GPUS counts gloo ranks.
# MAX_RESTARTS (0): how often ranks restart and resume after one has died.
# TIMEOUT (600): seconds that nodes and ranks wait for each other at the start.
set -e

if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
# shellcheck source=tools/dist_common.sh
source "$(dirname "$0")/dist_common.sh"

start_ranks "$2" --max_restarts="${MAX_RESTARTS:-0}" -- \
    train.py "$1" --launcher pytorch "${@:3}"
