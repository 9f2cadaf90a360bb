#!/usr/bin/env bash
# Usage: tools/study/smoke.sh
# The smallest slice of the study that means something, in under 10 minutes on 2
# cores, and the driver from end to end: prepares, trains, is stopped and goes
# on, has nothing left to do, and writes its tables and figure.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=work_dirs/study_smoke

bash tools/setup_env.sh
# shellcheck disable=SC1091
source .venv/bin/activate
rm -rf $OUT
mkdir -p $OUT
study() {
    python tools/study/run_study.py --study tools/study/smoke.py \
        --results $OUT/results.jsonl --work-dir $OUT/runs --jobs 2
}

echo "== Started, and killed with two runs done and two begun"
set -m # a process group of its own
study &
until [ -s $OUT/results.jsonl ]; do
    kill -0 $! # or it has failed
    sleep 1
done
sleep 20
kill -KILL -- -$!
wait $! || true
set +m
echo "== Going on"
study
before=$(wc -l < $OUT/results.jsonl)
echo "== Nothing is left to do"
study
[ "$(wc -l < $OUT/results.jsonl)" = "$before" ]
python tools/study/summarize.py --study tools/study/smoke.py \
    --results $OUT/results.jsonl --out $OUT/evidence.md \
    --figure $OUT/evidence.png
cat $OUT/evidence.md
