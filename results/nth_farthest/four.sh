#!/usr/bin/env bash
# Four points in four dimensions. four.jsonl has all of these runs except seeds 2 and 3 with a batch of 256. A run ends when three test accuracies in a row reach 90 %.
#
#   results/nth_farthest/four.sh                 all settings, one run after the other
#   results/nth_farthest/four.sh lstm-1024 3     some seeds of a setting
#
# Settings: OUT (runs/four), MINUTES and PYTHON, see results/train.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/four}
DEVICE=
source results/train.sh

task="--num-vectors 4 --num-dims 4 --outputunits 64 --lr 1e-3 --input-scale 3 --target-accuracy 0.9 --log-interval 200 --threads 1"
rmc="--memslots 4 --numheads 2 --headsize 16 --memory-scale 6"
declare -A flags=(
    [double-1024]="$rmc --init-scale 2 --batch-size 1024 --steps 20000"
    [double-256]="$rmc --init-scale 2 --batch-size 256 --steps 30000"
    [original-1024]="$rmc --batch-size 1024 --steps 20000"
    [original-256]="$rmc --batch-size 256 --steps 30000"
    [lstm-1024]="--model lstm --nhid 128 --batch-size 1024 --steps 20000"
)

for setting in ${1:-double-1024 lstm-1024 double-256 original-1024 original-256}; do
    for seed in ${2:-1 2 3}; do
        train train_nth_farthest "$setting-seed$seed" $task ${flags[$setting]} --seed "$seed"
    done
done
