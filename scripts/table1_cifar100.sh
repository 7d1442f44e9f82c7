#!/usr/bin/env bash
# Table 1, CIFAR-100: the plain CNN, every row and seed, into results/table1_cifar100. The settings are our choice, as
# nothing is published: rate and alpha are the defaults of a third party (models/cnn.py), whose rate is the share kept,
# and whose alpha 5 is our 0.4, as it divides the distortion by the 128 images of a batch and not by 10; the rest is
# train.py's CNN_RECIPE. table1_grid.sh, which is to choose them on held-out images, has not been run yet. With alpha 0
# the next weight has no say. Usage: [SEEDS="0 1 2"] [JOBS=1] [DRY_RUN=1] bash scripts/table1_cifar100.sh [FLAG of
# train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
run_rows results/table1_cifar100 "train.py --dataset cifar100 --model cnn" "$@" <<'ROWS'
none --method none
dropout --method dropout --dist_prob 0.5
disout-alpha0 --method disout --dist_prob 0.5 --alpha 0
disout --method disout --dist_prob 0.5 --alpha 5.0
ROWS
