#!/usr/bin/env bash
# Table 1, CIFAR-10: the plain CNN, every row and seed, into results/table1_cifar10. The authors published neither code nor
# settings of it, so all are our choice, by small_table1_grid.sh on held-out images of CIFAR-10. The rates grow from 0, for
# dropout too. With alpha 0 the next weight has no say. In bfloat16: leave --amp out on a CPU without its instructions.
# Usage: [SEEDS="0 1 2"] [JOBS=1] [DRY_RUN=1] bash scripts/table1_cifar10.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
run_rows results/table1_cifar10 "train.py --dataset cifar10 --model cnn --amp" "$@" <<'ROWS'
none --method none
dropout --method dropout --dist_prob 0.3
disout --method disout --dist_prob 0.3 --alpha 500
disout-alpha0 --method disout --dist_prob 0.3 --alpha 0
ROWS
