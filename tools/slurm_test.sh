#!/usr/bin/env bash
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of
#   tools/test.py]
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5) for each GPU, SRUN_ARGS
# for srun; TIMEOUT as for tools/dist_test.sh, which runs on each node. PORT is
# taken from the job's number unless it is set.
set -e

if [ $# -lt 4 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
# shellcheck source=tools/slurm_common.sh
source "$TOOLS/slurm_common.sh"

on_each_node "$1" "$2" "$TOOLS/dist_test.sh" \
    "$3" "$4" "$RANKS_PER_NODE" "${@:5}"
