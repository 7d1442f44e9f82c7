#!/usr/bin/env bash
# Linting and tests, on two cores with a thread each; arguments go to pytest. CIFAR_ROOT names the folder of the CIFAR
# files, for the tests on them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh "pytest>=8,<10" "pytest-xdist>=3,<4" "setuptools>=77" "hypothesis>=6,<7" "timm>=1,<2" "mypy>=1,<2" "ruff>=0.9,<1"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -ra -n 2 --dist worksteal "$@"
