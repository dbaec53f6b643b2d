#!/usr/bin/env bash
# The full-size runs on WikiText-2. Nobody has made them yet: they need a GPU.
#
#   results/wikitext2/run_gpu.sh                    all stages, one run after the other
#   results/wikitext2/run_gpu.sh original recipe    some stages; with several GPUs, start one call for each, with its
#                                                   own CUDA_VISIBLE_DEVICES and other stages
#
# Settings: OUT (runs/wikitext2), MINUTES, DEVICE (--cuda) and PYTHON (results/train.sh); EPOCHS of every run, for a
# rehearsal.
#
# Stages, in order:
#   original   the published arguments, and the RMC at the LSTM's size; three seeds
#   recipe     the recipe wikitext2 of both models, three seeds
#   table      the rows of the published search over the RMC's sizes, one seed
#   search     twelve trials of each model with at most 11M parameters, 30 epochs; the same draws for both
#   best       the trial of each model with the best validation perplexity, all epochs, three seeds
#   ablation   the best trials with one part removed or added, one seed
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/wikitext2}
DEVICE=${DEVICE---cuda}
source results/train.sh
epochs=(${EPOCHS:+--epochs "$EPOCHS"})

rmc() { train train_rmc "$@" ${epochs[@]+"${epochs[@]}"}; }
lstm() { train train_rnn "$@" ${epochs[@]+"${epochs[@]}"}; }

original() {
    for seed in 1 2 3; do
        rmc "original-rmc-seed$seed" --seed "$seed"
        lstm "original-lstm-seed$seed" --tied --cudnn --seed "$seed"
        rmc "original-rmc-10.75M-seed$seed" --emsize 184 --headsize 176 --seed "$seed"
    done
}

recipe() {
    for seed in 1 2 3; do
        for model in rmc lstm; do $model "recipe-$model-seed$seed" --recipe wikitext2 --seed "$seed"; done
    done
}

table() { # size of embedding and heads, heads, MLP layers, key size, dropout of the output, slots
    for row in "128 4 3 128 0 1" "128 8 3 128 0 1" "128 4 3 32 0 1" "128 4 3 32 0.5 1" "128 4 3 64 0 1" \
        "128 4 3 64 0.5 1" "128 4 2 64 0.5 1" "64 4 3 64 0.5 1" "64 4 3 32 0.5 1" "64 4 3 32 0.5 4" \
        "192 4 3 64 0.5 4" "256 4 3 256 0 1" "256 4 3 64 0.5 1"; do
        read -r size heads layers key dropout slots <<<"$row"
        rmc "table-${row// /-}" --emsize "$size" --headsize "$size" --numheads "$heads" --attmlplayers "$layers" \
            --keysize "$key" --dropout-output "$dropout" --memslots "$slots"
    done
}

rmc_sizes=("--emsize 256 --headsize 120 --attmlplayers 2" "--emsize 240 --headsize 128 --attmlplayers 2"
    "--emsize 184 --headsize 176 --attmlplayers 3" "--emsize 240 --headsize 140 --attmlplayers 1")
lstm_sizes=("--emsize 280 --nhid 280 --nlayers 2" "--emsize 220 --nhid 450 --nlayers 2 --project"
    "--emsize 184 --nhid 960 --nlayers 1 --project" "--emsize 184 --nhid 580 --nlayers 2 --project")
# Index in the sizes; learning rate; batch; dropout of input, output, words, weights; weight decay; recurrent
# dropout of the RMC; dropout between the layers of the LSTM. The first was chosen by hand, the others were drawn at
# random once.
trials=("0 0.002 40 0.4 0.4 0.1 0.4 0.03 0.1 0.25" "3 0.001 64 0.2 0.4 0 0.6 0.3 0.1 0.2"
    "0 0.001 20 0.2 0.4 0.05 0.4 0.03 0.1 0.2" "2 0.001 64 0.3 0.4 0.2 0 0.3 0.1 0.2"
    "0 0.001 40 0.2 0.5 0.2 0.6 0.003 0 0.1" "1 0.004 40 0.4 0.5 0 0.6 0.003 0 0.1"
    "2 0.004 20 0.5 0.4 0 0 0.3 0.2 0.3" "0 0.002 20 0.5 0.5 0 0 0.1 0.1 0.2"
    "1 0.001 40 0.5 0.3 0.05 0 0.03 0.1 0.2" "3 0.002 64 0.4 0.4 0.05 0.2 0.1 0 0.1"
    "2 0.004 20 0.5 0.4 0 0.2 0.3 0.1 0.2" "0 0.002 64 0.5 0.4 0.05 0.2 0.03 0.3 0.4")

trial() { # trial MODEL NUMBER: prints the flags
    local size lr batch input output words weights decay candidate hidden
    echo "--locked-dropout --schedule cosine --warmup 500 --clip 0.25 --bptt 70 --average ema --average-decay 0.9995"
    read -r size lr batch input output words weights decay candidate hidden <<<"${trials[$2]}"
    if [[ $1 = rmc ]]; then
        echo "${rmc_sizes[size]} --dropout-candidate $candidate"
    else
        echo "${lstm_sizes[size]} --tied --cudnn --dropout-hidden $hidden"
    fi
    echo "--lr $lr --batch-size $batch --dropout-input $input --dropout-output $output --dropout-words $words"
    echo "--dropout-weights $weights --weight-decay $decay"
}

search() {
    for number in "${!trials[@]}"; do
        for model in rmc lstm; do $model "search-$model-$number" $(trial $model "$number") --epochs 30; done
    done
}

best_trial() { # best_trial MODEL: prints the number of the finished trial with the lowest validation perplexity
    for number in "${!trials[@]}"; do
        if finished "search-$1-$number"; then
            grep '"event": "valid"' "$OUT/search-$1-$number/log.jsonl" | grep -oE '"(average_)?ppl": [0-9.]+' |
                sed "s/.*: //; s/$/ $number/"
        fi
    done | sort -g | sed -n '1s/.* //p'
}

best() {
    for model in rmc lstm; do
        number=$(best_trial $model)
        flags=$(trial $model "${number:?no trial of the stage search is finished}")
        for seed in 1 2 3; do
            $model "best-$model-seed$seed" $flags --seed "$seed"
        done
    done
}

ablation() {
    for model in rmc lstm; do
        number=$(best_trial $model)
        flags=$(trial $model "${number:?no trial of the stage search is finished}")
        if [[ $model = rmc ]]; then recurrent=--dropout-candidate; else recurrent=--dropout-hidden; fi
        for part in "--no-locked-dropout" "--dropout-words 0" "--dropout-weights 0" "$recurrent 0" "--weight-decay 0" \
            "--average none" "--schedule plateau" "--clip 0.1"; do
            name=${part//--/} && name="ablation-$model-${name// /-}"
            $model "$name" $flags --seed 1 $part
        done
    done
}

if (($# == 0)); then set -- original recipe table search best ablation; fi
for stage in "$@"; do
    case $stage in
        original | recipe | table | search | best | ablation) $stage ;;
        *) echo "no stage $stage: choose original, recipe, table, search, best or ablation" >&2; exit 2 ;;
    esac
done
"$PYTHON" tools/compare_runs.py "$OUT" >"$OUT/summary.md"
echo "finished: $OUT"
