#!/usr/bin/env bash
# Does distorting features beat dropping them in fully connected layers, and does the next weight matter there? The plain CNN
# of the paper's Table 1 on 5,000 images of CIFAR-10, 30 epochs, without augmentation, tested on the whole test set; five
# seeds, the same for all rows. The one primary contrast, set down before the first run: disout minus dropout, last epoch.
# Each method's settings are the best of small_table1_grid.sh on held-out images, by the mean of two seeds: none lr 0.04 and
# weight decay 8e-3; dropout the same, p 0.3; disout the same, alpha 500. Disout with alpha 0 (zeros, as dropout) and with
# the authors' 5 has the other settings of disout. Into results/small_table1.
# Usage: [SEEDS="0 1 2 3 4"] [JOBS=1] [DRY_RUN=1] bash scripts/studies/small_table1.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../rows.sh"
small="train.py --model cnn --amp --train_size 5000 --batch_size 64 --lr 0.04 --weight_decay 8e-3"
SEEDS=${SEEDS:-0 1 2 3 4} run_rows results/small_table1 "$small" "$@" <<'ROWS'
none --method none
dropout --method dropout --dist_prob 0.3
disout --method disout --dist_prob 0.3 --alpha 500
disout-alpha0 --method disout --dist_prob 0.3 --alpha 0
disout-alpha5 --method disout --dist_prob 0.3 --alpha 5
ROWS
