#!/usr/bin/env bash
# Makes .venv where there is none, and installs requirements.txt and what else is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed" >&2; exit 1; }
[ -x .venv/bin/pip ] || { echo "Making .venv; PyTorch is several GB, once." && python3 -m venv .venv; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
