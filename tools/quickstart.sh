#!/usr/bin/env bash
# Usage: tools/quickstart.sh
# Installs everything into .venv, and makes a small detection data set of real
# handwritten digits. Trains a Faster R-CNN with AGVM on it in two parallel
# processes, evaluates it and draws AGVM's measurements.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=configs/quickstart/faster-rcnn_r18_fpn_2xb8-agvm-4e_digits.py
WORK_DIR=work_dirs/quickstart
DATA=data/digits
LOG=work_dirs/quickstart.log

cat <<END
This trains a small Faster R-CNN with AGVM on images of digits. On 2 CPU cores:
  1. install everything into .venv    2 min, and 10 more to build MMCV
  2. draw the data set                10 s
  3. train on two processes           1 to 2 min
  4. evaluate                         10 s
  5. draw figures                     5 s
An existing installation and data set are kept. Details go to $LOG.
END
mkdir -p work_dirs
: > $LOG

step() {
    echo
    echo "== $1 of 5: $2"
}
ended() {
    [ $? = 0 ] && return
    echo
    echo "This step failed. The last lines of $LOG:"
    tail -n 40 $LOG
} >&2
trap ended EXIT

step 1 "installing, unless it is there"
bash tools/setup_env.sh 2>&1 | tee -a $LOG
# shellcheck disable=SC1091
source .venv/bin/activate

step 2 "drawing the data set in $DATA, unless it is there"
if [ ! -f $DATA/annotations/val.json ]; then
    python tools/dataset_converters/digits2coco.py $DATA >> $LOG 2>&1
fi

# the number of usable GPUs, or the reason why there is none
gpus=$(python - 2>> $LOG <<'PYTHON'
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
    step 3 "training on the CPU, with gloo: $gpus"
    export CUDA_VISIBLE_DEVICES=-1
    ;;
1)
    # NCCL needs a GPU for each rank: two micro-batches instead of two ranks
    step 3 "training on one GPU, with two accumulated micro-batches"
    ranks=1
    options=(--cfg-options optim_wrapper.accumulative_counts=2)
    ;;
*)
    step 3 "training on two of $gpus GPUs, with NCCL"
    ;;
esac
export PORT=${PORT:-$(python -c 'import socket
with socket.socket() as s: s.bind(("", 0)); print(s.getsockname()[1])')}

# shows the loss of every 50th iteration, and the AP of every evaluation
train='s/.*Epoch(train) *\[\([0-9]*\)\]\[ *\([0-9]*[05]0\)\/\([0-9]*\)\].*'
train+=' loss: \([0-9.]*\).*/epoch \1, iteration \2 of \3: loss \4/p'
evaluation='s/.*Epoch(val) *\[\([0-9]*\)\].*bbox_mAP: \([0-9.]*\).*'
evaluation+='/epoch \1: box AP \2/p'
started=$(date +%s)
bash tools/dist_train.sh $CONFIG $ranks --work-dir $WORK_DIR "${options[@]}" \
    2>&1 | tee -a $LOG | sed -nu -e "$train" -e "$evaluation"
took=$(($(date +%s) - started))
log_dir=$(find $WORK_DIR -mindepth 1 -maxdepth 1 -type d | sort | tail -n 1)

step 4 "evaluating"
checkpoint=$(cat $WORK_DIR/last_checkpoint)
python tools/test.py $CONFIG "$checkpoint" --work-dir $WORK_DIR \
    > $WORK_DIR/test.log 2>&1 || { cat $WORK_DIR/test.log >> $LOG; exit 1; }
ap=$(grep -o 'coco/bbox_mAP: [0-9.]*' $WORK_DIR/test.log | tail -n 1)

step 5 "drawing figures"
python tools/analysis_tools/plot_variance.py $WORK_DIR --formats png \
    >> $LOG 2>&1

cat <<END

Trained in $((took / 60)) min $((took % 60)) s; ${ap/coco\/bbox_mAP/COCO box AP}

Look at
  $WORK_DIR/overview.png    variance and multiplier of each module
  $WORK_DIR/*.png           more figures
  $log_dir    log and series
Next
  convert your config   python tools/misc/make_large_batch_config.py CONFIG \\
                            --batch-size 128 --gpus 8
  train with it         bash tools/dist_train.sh THE_NEW_CONFIG 8
  read the docs         docs/index.md, docs/settings.md
END
