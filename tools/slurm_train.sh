#!/usr/bin/env bash
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments
#   of tools/train.py]
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5) for each GPU, SRUN_ARGS
# for srun; MAX_RESTARTS and TIMEOUT as for tools/dist_train.sh, which runs on
# each node. PORT is taken from the job's number unless it is set.
set -e

if [ $# -lt 3 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
# shellcheck source=tools/slurm_common.sh
source "$TOOLS/slurm_common.sh"
CONFIG=$3
ARGS=("${@:4}")
# a work dir as for mmdet's script, or none as for mmseg's
if [ -n "${ARGS[0]}" ] && [ "${ARGS[0]#-}" = "${ARGS[0]}" ]; then
    ARGS=(--work-dir "${ARGS[0]}" "${ARGS[@]:1}")
fi

on_each_node "$1" "$2" "$TOOLS/dist_train.sh" \
    "$CONFIG" "$RANKS_PER_NODE" "${ARGS[@]}"
