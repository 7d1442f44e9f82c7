#!/usr/bin/env bash
# Does distorting features beat dropping them in fully connected layers, and does the next weight matter there? The plain CNN
# of the paper's Table 1 on 4,000 images of CIFAR-10, 8 epochs, without augmentation, tested on the whole test set; the same
# seeds for all. The learning rate is that of small_table1_grid.sh; the rate grows to 0.5 for all, which is usual for dropout,
# and not tuned for any. Disout with alpha 0 (zeros, as dropout), with the authors' 5, whose noise is small here, and with 50
# (see results/README.md). Into results/small_table1. Usage: [SEEDS="0 1 2"] [JOBS=1] [DRY_RUN=1] bash
# scripts/studies/small_table1.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../rows.sh"
small="train.py --dataset cifar10 --model cnn --train_size 4000 --epochs 8 --batch_size 64 --lr 0.005"
run_rows results/small_table1 "$small" "$@" <<'ROWS'
none --method none
dropout --method dropout --dist_prob 0.5
disout --method disout --dist_prob 0.5 --alpha 5.0
disout-alpha50 --method disout --dist_prob 0.5 --alpha 50
disout-alpha0 --method disout --dist_prob 0.5 --alpha 0
ROWS
