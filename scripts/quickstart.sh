#!/usr/bin/env bash
# A first look in about a minute, offline once installed: a small ResNet with Disout on scikit-learn's handwritten digits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python train.py --dataset digits --depth 8 --augment none --epochs 30 --name quickstart --resume
echo "The curve: results/quickstart/curve.png"
