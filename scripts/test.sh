#!/usr/bin/env bash
# Linting and tests; arguments go to pytest. CIFAR_ROOT names the folder of the CIFAR files, for the tests on them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh "pytest>=8,<10" "setuptools>=77" "hypothesis>=6,<7" "timm>=1,<2" "mypy>=1,<2" "ruff>=0.9,<1"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -ra "$@"
