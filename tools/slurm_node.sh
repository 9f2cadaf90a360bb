#!/usr/bin/env bash
# Usage: tools/slurm_node.sh SCRIPT [ARGUMENT...]
# The one task of a node, started by slurm_common.sh: runs a dist_*.sh with the
# addresses and numbers of the nodes from Slurm.
set -e

if [ -z "$MASTER_ADDR" ]; then
    # task 0 runs on the first node of the list
    nodes=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
    MASTER_ADDR=${nodes%%$'\n'*}
fi
export MASTER_ADDR
export NNODES=$SLURM_NTASKS
export NODE_RANK=$SLURM_PROCID
# by job, since two of them may share a node; below the ports that Linux gives
# to outgoing connections
export PORT=${PORT:-${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}}

exec bash "$@"
