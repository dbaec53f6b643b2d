#!/usr/bin/env bash
# The runs of sweep.jsonl, each with one change from a base setting, except the four that changed the model's first
# weights (init-*) and the two with the curriculum flags of commit 799a55e, and the runs of four.jsonl (four points in four dimensions). The flags, all readings and the hardware
# of the committed runs are in these files. clip-1 has not been run yet.
#
#   results/nth_farthest/sweep.sh           all settings, one run after the other; a table at the end
#   results/nth_farthest/sweep.sh base      some settings
#
# Settings: OUT (runs/sweep), MINUTES and PYTHON (results/train.sh explains them).
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/sweep}
DEVICE=
source results/train.sh

three="--num-vectors 3 --outputunits 64 --memslots 3 --headsize 16 --input-scale 3 --lr 1e-3 --target-accuracy 0.9"
base="$three --num-dims 1 --batch-size 64 --steps 2000 --numheads 2 --memory-scale 6"
plane="$three --num-dims 2 --batch-size 128 --steps 3000 --numheads 4 --memory-scale 8"
hard="--num-vectors 4 --num-dims 2 --outputunits 64 --batch-size 64 --lr 5e-4 --steps 4000 --memslots 4 --numheads 2 \
--headsize 16 --input-scale 2 --memory-scale 6 --target-accuracy 0.9"
four="--num-vectors 4 --num-dims 4 --outputunits 64 --lr 1e-3 --input-scale 3 --target-accuracy 0.9 --log-interval 200"
four_rmc="$four --memslots 4 --numheads 2 --headsize 16 --memory-scale 6"
chosen=" $* "

# setting NAME SEEDS FLAGS: of a flag that is given twice, the second one counts.
setting() {
    if [[ $chosen != "  " && $chosen != *" $1 "* ]]; then return; fi
    for seed in $(seq "$2"); do train train_nth_farthest "$1-seed$seed" $3 --seed "$seed" --threads 1; done
}

setting base 3 "$base"
setting lr-3e-4 3 "$base --lr 3e-4"
setting lr-3e-3 3 "$base --lr 3e-3"
setting hard 2 "$hard"
setting plane 3 "$plane"
setting batch-16 3 "$base --batch-size 16"
setting batch-256 3 "$base --batch-size 256"
setting batch-256-lr-3e-3 3 "$base --batch-size 256 --lr 3e-3"
setting heads-1x32 3 "$base --numheads 1 --headsize 32"
setting heads-8x4 3 "$base --numheads 8 --headsize 4"
setting slots-1 3 "$base --memslots 1"
setting clip-none 3 "$base --clip 0"
setting batch-256-lr-3e-4 3 "$base --batch-size 256 --lr 3e-4"
setting slots-8 3 "$base --memslots 8"
setting warmup-500 3 "$base --warmup 500"
setting lr-1e-4 3 "$base --lr 1e-4 --steps 6000"
setting gates-none 3 "$base --gatestyle none"
setting gates-memory 3 "$base --gatestyle memory"
setting forget-bias-3 3 "$base --forgetbias 3"
setting heads-4x8 3 "$base --numheads 4 --headsize 8"
setting bf16 3 "$base --bf16"
setting clip-1 3 "$base --clip 1"
setting original-1024 3 "$four_rmc --batch-size 1024 --steps 20000"
setting double-1024 3 "$four_rmc --init-scale 2 --batch-size 1024 --steps 20000"
setting original-256 1 "$four_rmc --batch-size 256 --steps 30000"
setting double-256 1 "$four_rmc --init-scale 2 --batch-size 256 --steps 30000"
setting lstm-1024 3 "$four --model lstm --nhid 128 --batch-size 1024 --steps 20000"
"$PYTHON" tools/compare_runs.py "$OUT"
