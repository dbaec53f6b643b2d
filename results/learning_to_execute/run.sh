#!/usr/bin/env bash
# The runs of runs.jsonl, one after the other; finished runs are skipped and unfinished ones resumed.
#
#   results/learning_to_execute/run.sh                    the six kinds, RMC and LSTM, seed 1; a table at the end
#   SEEDS="1 2 3" results/learning_to_execute/run.sh copy reverse
#   DEVICE=--cuda results/learning_to_execute/run.sh paper    the paper's sizes and steps; not run yet
#
# Settings: OUT (runs/learning_to_execute), SEEDS (1), MINUTES, DEVICE and PYTHON (results/train.sh explains them).
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/learning_to_execute}
DEVICE=${DEVICE:-}
SEEDS=${SEEDS:-1}
source results/train.sh

# both NAME FLAGS...: the RMC and the LSTM, whose best rate was twice as high in short trials (trials.txt).
both() {
    for seed in $SEEDS; do
        train train_learning_to_execute "$1-rmc-seed$seed" "${@:2}" --seed "$seed"
        lr=0.01
        if [[ $1 == addition ]]; then lr=0.004; fi
        train train_learning_to_execute "$1-lstm-seed$seed" "${@:2}" --model lstm --lr $lr --seed "$seed"
    done
}

kinds=(reverse copy control double program addition)
case "$*" in
    paper)
        for kind in "${kinds[@]}"; do
            for model in rmc lstm; do
                train train_learning_to_execute "paper-$kind-$model" --program-kind "$kind" --model "$model"
            done
        done ;;
    *)
        for kind in "${@:-${kinds[@]}}"; do both "$kind" --recipe "$kind"; done ;;
esac
"$PYTHON" tools/compare_runs.py "$OUT"
