#!/usr/bin/env bash
# Usage: tools/slurm_check.sh PARTITION JOB_NAME [arguments of
#   tools/check_setup.py]
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5) for each GPU, SRUN_ARGS
# for srun; TIMEOUT as for tools/dist_check.sh, which runs on each node. PORT is
# taken from the job's number unless it is set.
set -e

if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
# shellcheck source=tools/slurm_common.sh
source "$TOOLS/slurm_common.sh"

on_each_node "$1" "$2" "$TOOLS/dist_check.sh" "$RANKS_PER_NODE" "${@:3}"
