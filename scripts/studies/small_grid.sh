#!/usr/bin/env bash
# Where small_study.sh gets its settings from: the same training, evaluated on 5,000 training images that are neither trained
# nor tested on; nine settings of Disout (rate, alpha) and nine of DropBlock (rate, block), one seed that the study does not
# use. Into results/small_grid. Usage: [SEEDS=100] [JOBS=1] [DRY_RUN=1] bash scripts/studies/small_grid.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../rows.sh"
SEEDS=${SEEDS:-100}
rows="none --method none
none-augmented --method none --augment standard"
for rate in 0.09 0.2 0.4; do
    for alpha in 1 5 20; do
        rows+=$'\n'"disout-p$rate-alpha$alpha --method disout --block_size 6 --dist_prob $rate --alpha $alpha"
    done
    for block in 2 4 6; do
        rows+=$'\n'"dropblock-p$rate-block$block --method dropblock --dist_prob $rate --block_size $block"
    done
done
small="train.py --dataset cifar10 --depth 20 --train_size 5000 --holdout 5000 --epochs 30 --amp --augment none"
run_rows results/small_grid "$small" "$@" <<<"$rows"
