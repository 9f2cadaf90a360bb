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
CONFIG=$1
CHECKPOINT=$2
GPUS=$3
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
TIMEOUT=${TIMEOUT:-600}
# for messages, and for the ranks
export NNODES NODE_RANK PORT MASTER_ADDR TIMEOUT

exec python "$(dirname "$0")/dist_run.py" \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --master_port="$PORT" \
    --nproc_per_node="$GPUS" \
    --rdzv_conf="timeout=$TIMEOUT" \
    "$(dirname "$0")/test.py" \
    "$CONFIG" \
    "$CHECKPOINT" \
    --launcher pytorch "${@:4}"
