#!/usr/bin/env bash
# The runs of curriculum.jsonl: the paper's task (8 vectors of 16 dimensions) by way of easier ones, and what each part
# of the recipe is worth.
#
#   results/nth_farthest/curriculum.sh                  all runs, one after the other; a table at the end
#   results/nth_farthest/curriculum.sh seed1 lstm       some runs
#
# Settings: OUT (runs/curriculum), MINUTES and PYTHON (results/train.sh explains them).
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/curriculum}
DEVICE=
source results/train.sh
chosen=" $* "

# run NAME FLAGS...
run() {
    if [[ $chosen != "  " && $chosen != *" $1 "* ]]; then return; fi
    train "${SCRIPT:-train_nth_farthest}" "$1" --recipe curriculum "${@:2}"
}

run seed1 --seed 1
run seed2 --seed 2 --steps 55000
run seed3 --seed 3
run wide --seed 1 --numheads 8 --outputunits 256
run lstm --seed 1 --model lstm --nhid 300
run adam --seed 1 --optimizer adam
run no-curriculum --seed 1 --curriculum 8x16
run vectors-first --seed 1 --curriculum 3x1 4x1 5x1 8x1 8x2 8x4
run both-at-once --seed 1 --curriculum 3x1 4x4 5x8
export WITHOUT=length SCRIPT=results/nth_farthest/without
run without-length --seed 1
export WITHOUT=short
run without-short --seed 1
"$PYTHON" tools/compare_runs.py "$OUT"
