# shellcheck shell=bash
# What dist_train.sh, dist_test.sh and dist_check.sh share; sourced by them.

# start_ranks GPUS [OPTION OF TORCHRUN...] -- SCRIPT [ARGUMENT...]: become
# torchrun, which runs a script of tools/ on GPUS ranks of this node.
start_ranks() {
    # for messages, and for the ranks
    export NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} PORT=${PORT:-29500}
    export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} TIMEOUT=${TIMEOUT:-600}
    local gpus=$1 options=() tools
    tools=$(dirname "$0")
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    exec python "$tools/dist_run.py" \
        --nnodes="$NNODES" \
        --node_rank="$NODE_RANK" \
        --master_addr="$MASTER_ADDR" \
        --master_port="$PORT" \
        --nproc_per_node="$gpus" \
        "${options[@]}" \
        --rdzv_conf="timeout=$TIMEOUT" \
        "$tools/$2" "${@:3}"
}
