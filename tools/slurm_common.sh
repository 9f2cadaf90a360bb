# shellcheck shell=bash
# What slurm_train.sh, slurm_test.sh and slurm_check.sh share; sourced by them.
# Sets RANKS_PER_NODE, from GPUS and GPUS_PER_NODE.

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
RANKS_PER_NODE=$((GPUS < GPUS_PER_NODE ? GPUS : GPUS_PER_NODE))
if [ $RANKS_PER_NODE -lt 1 ] || [ $((GPUS % RANKS_PER_NODE)) -ne 0 ]; then
    # torchrun starts as many ranks on one node as on any other
    echo "GPUS=$GPUS cannot be divided among nodes of" \
         "GPUS_PER_NODE=$GPUS_PER_NODE: make it a multiple of that" >&2
    exit 2
fi

# on_each_node PARTITION JOB_NAME SCRIPT [ARGUMENT...]: run a dist_*.sh on each
# node. The script starts a rank for each GPU, and can restart them, which srun
# cannot. So srun has one task for each node, with the CPUs of all its ranks.
on_each_node() {
    local nodes=$((GPUS / RANKS_PER_NODE))
    # shellcheck disable=SC2086  # SRUN_ARGS are several words
    srun -p "$1" \
        --job-name="$2" \
        --gres="gpu:$RANKS_PER_NODE" \
        --nodes="$nodes" \
        --ntasks="$nodes" \
        --ntasks-per-node=1 \
        --cpus-per-task=$((${CPUS_PER_TASK:-5} * RANKS_PER_NODE)) \
        --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        bash "$(dirname "$0")/slurm_node.sh" "${@:3}"
}
