#!/usr/bin/env bash
# The full task, 8 vectors of 16 dimensions, on a GPU: the relational memory core with three seeds, then the LSTM
# for as many steps as the slowest of them took, then the plot. It works for MINUTES and stops; call it again, with
# the same settings, until it says that all is finished. What it did so far is in OUT at any moment.
#
#   results/nth_farthest/run_gpu.sh                     the paper's protocol
#   RECIPE=ours results/nth_farthest/run_gpu.sh         our recipe (docs/nth_farthest.md)
#   ... --num-dims 32                                   further flags go to every run
#
# Settings, as environment variables:
#   OUT       folder of the runs                        (runs/nth_farthest_gpu_<RECIPE>)
#   MINUTES   length of one call                        (9)
#   SEEDS     seeds of the relational memory core       (1 2 3)
#   STEPS     most steps of a run                       (500000)
#   TARGET    test accuracy at which a run is done      (0.95)
#   DEVICE    --cuda, or nothing for the CPU            (--cuda)
#   PYTHON    the interpreter                           (python)
set -euo pipefail
cd "$(dirname "$0")/../.."

RECIPE=${RECIPE:-paper}
OUT=${OUT:-runs/nth_farthest_gpu_$RECIPE}
MINUTES=${MINUTES:-9}
SEEDS=${SEEDS:-1 2 3}
STEPS=${STEPS:-500000}
TARGET=${TARGET:-0.95}
DEVICE=${DEVICE---cuda}
PYTHON=${PYTHON:-python}

case $RECIPE in
    paper) recipe=() ;;
    ours) recipe=(--lr 3e-4 --warmup 1000 --memory-scale 16) ;;
    *) echo "RECIPE must be paper or ours, got $RECIPE" >&2; exit 2 ;;
esac
deadline=$((SECONDS + MINUTES * 60))

# train NAME FLAGS...: starts the run, or goes on with it; does nothing when it is finished; ends the script when the
# time is over.
train() {
    local name=$1 folder=$OUT/$1 left=$((deadline - SECONDS)) session
    shift
    if finished "$folder"; then return; fi
    if ((left < 1)); then out_of_time; fi
    session=(--stop-after "$(printf '%d.%03d' $((left / 60)) $((left % 60 * 1000 / 60)))")
    if [[ -f $folder/args.json ]]; then
        "$PYTHON" train_nth_farthest.py --resume "$folder" $DEVICE "${session[@]}"
    else
        # A run that was killed as it made its folder has left it without arguments.
        if [[ -d $folder ]]; then "$PYTHON" -c 'import runs, sys; runs.discard_unbegun_run_folder(sys.argv[1])' "$folder"; fi
        "$PYTHON" train_nth_farthest.py --runs-folder "$OUT" --name "$name" $DEVICE --steps "$STEPS" \
            --log-interval 250 --save-every 1 "$@" "${session[@]}"
    fi
    finished "$folder" || out_of_time
}

finished() { grep -qs '"event": "final"' "$1/log.jsonl"; }

out_of_time() {
    echo "time is over; call again to go on"
    exit 0
}

rmc=()
for seed in $SEEDS; do
    train "rmc-seed$seed" --seed "$seed" --target-accuracy "$TARGET" ${recipe[@]+"${recipe[@]}"} "$@"
    rmc+=("$OUT/rmc-seed$seed")
done

# The LSTM gets the steps that the slowest core took, and the recipe's flags (the memory's scale means nothing to it).
STEPS=$(for run in "${rmc[@]}"; do grep -o '"event": "train", "step": [0-9]*' "$run/log.jsonl" | tail -n 1; done |
    grep -o '[0-9]*$' | sort -n | tail -n 1)
train lstm-seed1 --model lstm --nhid 2048 --seed 1 ${recipe[@]+"${recipe[@]}"} "$@"

"$PYTHON" plot_runs.py "${rmc[@]}" "$OUT/lstm-seed1" --outf "$OUT/curves.png"
echo "all runs are finished: $OUT"
