#!/usr/bin/env bash
# The learning rate of small_table1.sh: the same training without regularizer, evaluated on 2,000 training images that are
# neither trained nor tested on, one seed that the study does not use. Into results/small_table1_grid.
# Usage: [SEEDS=100] [JOBS=1] [DRY_RUN=1] bash scripts/small_table1_grid.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
small="train.py --dataset cifar10 --model cnn --train_size 4000 --epochs 8 --batch_size 64"
SEEDS=${SEEDS:-100} run_rows results/small_table1_grid "$small --holdout 2000 --method none" "$@" <<'ROWS'
none-lr0.0025 --lr 0.0025
none-lr0.005 --lr 0.005
none-lr0.01 --lr 0.01
none-lr0.02 --lr 0.02
ROWS
