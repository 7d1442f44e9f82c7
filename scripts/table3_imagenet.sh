#!/usr/bin/env bash
# Table 3: ResNet-50 on ImageNet, every row and seed, into results/table3_imagenet. Usage: [SEEDS="0 1 2"] [JOBS=1]
# [LAUNCH="torchrun --nproc_per_node=8"] [DRY_RUN=1] bash scripts/table3_imagenet.sh [FLAG of train_imagenet.py...]
# A folder for --data has to be called imagenet (a link does), as its name is the data set's in the tables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
run_rows results/table3_imagenet train_imagenet.py "$@" <<'ROWS'
none --method none
dropout --method dropout --dist_prob 0.3
drop_path --method drop_path --dist_prob 0.1
spatial_dropout --method spatial_dropout --dist_prob 0.1
cutout --method none --augment cutout
autoaugment --method none --augment autoaugment
label_smoothing --method none --label_smoothing 0.1
dropblock --method dropblock --dist_prob 0.1 --block_size 7
disout_elementwise --method disout --dist_prob 0.07 --block_size 1 --alpha 1.0
disout --method disout --dist_prob 0.07 --block_size 7 --alpha 1.0
ROWS
