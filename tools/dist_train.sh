#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR
# and PORT in the environment. Without GPUs, GPUS counts gloo ranks.
# MAX_RESTARTS (0): how often ranks that died are started again, and resume.
# TIMEOUT (600): seconds that nodes and ranks wait for each other at the start.
set -e

if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
MAX_RESTARTS=${MAX_RESTARTS:-0}
TIMEOUT=${TIMEOUT:-600}
# for messages, and for the ranks
export NNODES NODE_RANK PORT MASTER_ADDR TIMEOUT

exec python "$(dirname "$0")/dist_run.py" \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --master_port="$PORT" \
    --nproc_per_node="$GPUS" \
    --max_restarts="$MAX_RESTARTS" \
    --rdzv_conf="timeout=$TIMEOUT" \
    "$(dirname "$0")/train.py" \
    "$CONFIG" \
    --launcher pytorch "${@:3}"
