#!/usr/bin/env bash
# Does distorting features beat dropping them, where a network overfits? ResNet-20 on 5,000 images of CIFAR-10, 30 epochs,
# without augmentation, tested on the whole test set; the same seeds for all. DropBlock and Disout have the published setting,
# which small_grid.sh also chose on held-out images. Eight seeds; beside them, with four seeds, element-wise Disout, even
# blocks inside the map, at the same nominal rate and at the one that distorts as many elements (7.61 %), and Disout in
# float32. Into results/small_study. Usage: [SEEDS="0 1"] [JOBS=1] [DRY_RUN=1] bash scripts/studies/small_study.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../rows.sh"
small="train.py --dataset cifar10 --depth 20 --train_size 5000 --epochs 30 --augment none"
SEEDS=${SEEDS:-0 1 2 3 4 5 6 7} run_rows results/small_study "$small --amp" "$@" <<'ROWS'
none --method none
dropblock --method dropblock --dist_prob 0.09 --block_size 6
disout --method disout --dist_prob 0.09 --block_size 6 --alpha 5.0
ROWS
SEEDS=${SEEDS:-0 1 2 3} run_rows results/small_study "$small --amp" "$@" <<'ROWS'
disout-elementwise --method disout --dist_prob 0.09 --block_size 1 --alpha 5.0
disout-inside --method disout --dist_prob 0.09 --block_size 6 --alpha 5.0 --inside
disout-inside-same-share --method disout --dist_prob 0.0795 --block_size 6 --alpha 5.0 --inside
ROWS
SEEDS=${SEEDS:-0 1 2 3} run_rows results/small_study "$small" "$@" <<'ROWS'
disout-float32 --method disout --dist_prob 0.09 --block_size 6 --alpha 5.0
ROWS
