#!/usr/bin/env bash
# The paper's protocol, without a curriculum: the RMC with several seeds, the LSTM for as many steps as the slowest of
# them, and the plot. Nobody has made these runs yet: they need a GPU.
#
#   results/nth_farthest/run_gpu.sh                     the paper's protocol
#   ... --num-dims 32                                   further flags go to every run
#
# Settings: OUT (runs/nth_farthest_gpu), MINUTES (9), DEVICE (--cuda), PYTHON (see results/train.sh),
#   SEEDS   seeds of the RMC                            (1 2 3)
#   STEPS   most steps of a run                         (500000)
#   TARGET  test accuracy at which a run ends           (0.95)
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/nth_farthest_gpu}
MINUTES=${MINUTES:-9}
DEVICE=${DEVICE---cuda}
source results/train.sh

flags=(--log-interval 250 --save-every 1 "$@")

rmc=()
for seed in ${SEEDS:-1 2 3}; do
    train train_nth_farthest "rmc-seed$seed" --seed "$seed" --steps "${STEPS:-500000}" \
        --target-accuracy "${TARGET:-0.95}" "${flags[@]}"
    rmc+=("$OUT/rmc-seed$seed")
done
steps=$(for run in "${rmc[@]}"; do grep -o '"event": "train", "step": [0-9]*' "$run/log.jsonl"; done |
    grep -o '[0-9]*$' | sort -n | tail -n 1)
train train_nth_farthest lstm-seed1 --model lstm --nhid 2048 --seed 1 --steps "$steps" "${flags[@]}"
"$PYTHON" tools/plot_runs.py "${rmc[@]}" "$OUT/lstm-seed1" --outf "$OUT/curves.png"
echo "all runs are finished: $OUT"
