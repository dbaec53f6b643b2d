#!/usr/bin/env bash
# The short CPU runs of runs.jsonl, one after the other: WikiText-2 with small models; the bundled corpus with one kind
# of regularization at a time. The runs *-recipe, *-ar-tar, *-windows, *-embedding-lr-* and *-all used flags that are no
# longer here; `git show 799a55e:results/recipe_cpu/run.sh` has their commands.
#
# Settings: OUT (runs/recipe_cpu), MINUTES and PYTHON (results/train.sh explains them).
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/recipe_cpu}
DEVICE=
source results/train.sh

small=(--data wikitext-2 --adaptivesoftmax --cutoffs 1000 5000 20000 --batch_size 32 --bptt 35
    --dropout 0.1 --lr 0.002 --clip 0.25 --epochs 2 --threads 1)
rmc=(--emsize 48 --headsize 24 --numheads 4 --keysize 16 --attmlplayers 2)
lstm=(--emsize 48 --nhid 128 --project --cudnn)
train train_rmc wikitext2-rmc-plain "${small[@]}" "${rmc[@]}"
train train_rnn wikitext2-lstm-plain "${small[@]}" "${lstm[@]}"

for kind in rnn rmc; do
    tiny=(--recipe tiny --epochs 3)
    train "train_$kind" "tiny-$kind-none" "${tiny[@]}"
    train "train_$kind" "tiny-$kind-locked" "${tiny[@]}" --locked-dropout
    train "train_$kind" "tiny-$kind-words" "${tiny[@]}" --dropout-words 0.05
    train "train_$kind" "tiny-$kind-weights" "${tiny[@]}" --dropout-weights 0.1
    if [[ $kind = rmc ]]; then
        train train_rmc tiny-rmc-candidate "${tiny[@]}" --dropout-candidate 0.1
    else
        train train_rnn tiny-rnn-candidate "${tiny[@]}" --no-cudnn --dropout-candidate 0.1
    fi
    train "train_$kind" "tiny-$kind-decay" "${tiny[@]}" --weight-decay 0.1
    train "train_$kind" "tiny-$kind-ema" "${tiny[@]}" --average ema --average-decay 0.99
done
