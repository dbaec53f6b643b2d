#!/usr/bin/env bash
# The full task, 8 vectors of 16 dimensions: the RMC with several seeds, the LSTM for as many steps as the slowest of
# them, and the plot. Nobody has made these runs yet: they need a GPU.
#
#   results/nth_farthest/run_gpu.sh                     the paper's protocol
#   RECIPE=ours results/nth_farthest/run_gpu.sh         our recipe (docs/nth_farthest.md)
#   ... --num-dims 32                                   further flags go to every run
#
# Settings: OUT (runs/nth_farthest_gpu_RECIPE), MINUTES (9), DEVICE (--cuda), PYTHON (see results/train.sh),
#   SEEDS   seeds of the RMC                            (1 2 3)
#   STEPS   most steps of a run                         (500000)
#   TARGET  test accuracy at which a run ends           (0.95)
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=${RECIPE:-paper}
OUT=${OUT:-runs/nth_farthest_gpu_$RECIPE}
MINUTES=${MINUTES:-9}
DEVICE=${DEVICE---cuda}
source results/train.sh

case $RECIPE in
    paper) recipe=() ;;
    ours) recipe=(--lr 3e-4 --warmup 1000 --memory-scale 16) ;;
    *) echo "RECIPE must be paper or ours, got $RECIPE" >&2; exit 2 ;;
esac
flags=(--log-interval 250 --save-every 1 ${recipe[@]+"${recipe[@]}"} "$@")

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
