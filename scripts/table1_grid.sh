#!/usr/bin/env bash
# Where table1_*.sh are to get their settings from: the same training, evaluated on 5,000 training images that are neither
# trained nor tested on, one seed that the tables do not use. Learning rate and weight decay are chosen without regularizer, for
# all rows; where train.py's (CNN_RECIPE) are not the best, they change there, and the rows after these run again. Then as many
# settings of dropout as of Disout, six: dropout has its rate alone, so there are more of them; Disout has three of these rates
# with two alphas. Alpha 5 is the authors' on CIFAR; with the weights as they are at first, the distortion is then 5 % of the
# features' deviation after the first layer and 3 % after the second, nearly dropout. With 50 it is 54 % and 26 %, and much
# beyond that it would be larger than the features.
# Into results/table1_grid. Usage: [SEEDS=100] [JOBS=1] [DRY_RUN=1] bash scripts/table1_grid.sh [FLAG of train.py...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
SEEDS=${SEEDS:-100}
rows=""
for lr in 0.01 0.02 0.05; do
    for decay in 0 5e-4; do
        rows+="none-lr$lr-decay$decay --method none --lr $lr --weight_decay $decay"$'\n'
    done
done
for rate in 0.2 0.3 0.4 0.5 0.6 0.7; do
    rows+="dropout-p$rate --method dropout --dist_prob $rate"$'\n'
done
for rate in 0.3 0.5 0.7; do
    for alpha in 5 50; do
        rows+="disout-p$rate-alpha$alpha --method disout --dist_prob $rate --alpha $alpha"$'\n'
    done
done
run_rows results/table1_grid "train.py --dataset cifar10 --model cnn --holdout 5000" "$@" <<<"${rows%$'\n'}"
