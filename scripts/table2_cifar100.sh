#!/usr/bin/env bash
# Table 2, CIFAR-100: ResNet-56, every row and seed, into results/table2_cifar100. Usage: [SEEDS="0 1 2"] [JOBS=1] [DRY_RUN=1]
# bash scripts/table2_cifar100.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
run_rows results/table2_cifar100 "train.py --dataset cifar100" "$@" <<'ROWS'
none --method none
dropblock --method dropblock --dist_prob 0.09 --block_size 6
disout --method disout --dist_prob 0.09 --block_size 6 --alpha 5.0
ROWS
