#!/usr/bin/env bash
# Usage: tools/quickstart.sh
# Installs everything into .venv, makes a small detection data set of real
# handwritten digits, trains a Faster R-CNN with AGVM on it with two parallel
# processes, evaluates it and draws what AGVM measured.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=configs/quickstart/faster-rcnn_r18_fpn_2xb8-agvm-4e_digits.py
WORK_DIR=work_dirs/quickstart
DATA=data/digits

bash tools/setup_env.sh
# shellcheck disable=SC1091
source .venv/bin/activate

if [ ! -f $DATA/annotations/val.json ]; then
    echo "== Drawing the data set"
    python tools/dataset_converters/digits2coco.py $DATA
fi

# how many GPUs can be used, or in words why none
gpus=$(python - <<'PYTHON'
import torch
from mmcv.ops import get_compiling_cuda_version

if not torch.cuda.is_available():
    print('there is no GPU')
elif get_compiling_cuda_version() == 'not available':
    print('MMCV was built without its CUDA ops, having found no nvcc')
else:
    print(torch.cuda.device_count())
PYTHON
)
ranks=2
options=()
case $gpus in
*[!0-9]*)
    echo "== Training on the CPU, with gloo: $gpus"
    export CUDA_VISIBLE_DEVICES=-1
    ;;
1)
    # NCCL wants a GPU for each rank: two micro-batches instead of two ranks
    echo "== Training on one GPU, with two accumulated micro-batches"
    ranks=1
    options=(--cfg-options optim_wrapper.accumulative_counts=2)
    ;;
*)
    echo "== Training on two of $gpus GPUs, with NCCL"
    ;;
esac
export PORT=${PORT:-$(python -c 'import socket
with socket.socket() as s: s.bind(("", 0)); print(s.getsockname()[1])')}

started=$(date +%s)
bash tools/dist_train.sh $CONFIG $ranks --work-dir $WORK_DIR "${options[@]}"
took=$(($(date +%s) - started))
log_dir=$(find $WORK_DIR -mindepth 1 -maxdepth 1 -type d | sort | tail -n 1)

echo "== Evaluating and drawing"
checkpoint=$(cat $WORK_DIR/last_checkpoint)
python tools/test.py $CONFIG "$checkpoint" --work-dir $WORK_DIR \
    > $WORK_DIR/test.log 2>&1
python tools/analysis_tools/plot_variance.py $WORK_DIR --formats png
ap=$(grep -o 'coco/bbox_mAP: [0-9.]*' $WORK_DIR/test.log | tail -n 1)

cat <<END

Trained in $((took / 60)) min $((took % 60)) s; ${ap/coco\/bbox_mAP/COCO box AP}
  pictures    $WORK_DIR/*.png, first overview.png
  log         $log_dir
  checkpoint  $checkpoint
END
