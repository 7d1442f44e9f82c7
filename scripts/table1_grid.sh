#!/usr/bin/env bash
# The rates of table1_*.sh: the same training on 10,000 images, evaluated on 5,000 training images that are neither trained nor
# tested on, one seed that the tables do not use, as many rates for dropout as for Disout. Alpha is the authors' for
# convolutions. The learning rate, 0.02 for 128 images, is 0.01 for 64, whose half and double came within 0.1 of it in
# the last epoch of small_table1_grid.sh. Into results/table1_grid. Usage: [SEEDS=100] [JOBS=1] [DRY_RUN=1] bash
# scripts/table1_grid.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
grid="train.py --dataset cifar10 --model cnn --amp --train_size 10000 --holdout 5000"
SEEDS=${SEEDS:-100} run_rows results/table1_grid "$grid" "$@" <<'ROWS'
dropout-p0.3 --method dropout --dist_prob 0.3
disout-p0.3 --method disout --dist_prob 0.3 --alpha 5.0
dropout-p0.5 --method dropout --dist_prob 0.5
disout-p0.5 --method disout --dist_prob 0.5 --alpha 5.0
dropout-p0.7 --method dropout --dist_prob 0.7
disout-p0.7 --method disout --dist_prob 0.7 --alpha 5.0
ROWS
