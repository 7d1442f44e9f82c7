#!/usr/bin/env bash
# The question of small_study.sh on photographs: ResNet-50 with the published settings on data/imagenette (train/CLASS/*,
# val/CLASS/*), 64 x 64, without augmentation, so that it overfits: 3,000 images to train on, 1,000 to test, of Imagenette's
# ten classes of ImageNet, those in results/published/photographs_study/images.txt. At this size blocks of 7 cover nearly all
# maps whole. Into results/photographs_study. Usage: [SEEDS="0 1 2"] [JOBS=1] [DRY_RUN=1] bash scripts/studies/photographs_study.sh
# [FLAG of train_imagenet.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../rows.sh"
small="train_imagenet.py --data data/imagenette --image_size 64 --epochs 10 --batch_size 32 --lr 0.0125 --workers 1"
run_rows results/photographs_study "$small --augment none" "$@" <<'ROWS'
none --method none
dropblock --method dropblock --dist_prob 0.1 --block_size 7
disout --method disout --dist_prob 0.07 --block_size 7 --alpha 1.0
ROWS
