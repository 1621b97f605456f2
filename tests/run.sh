#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs all that the tests need, then runs every check: ruff, mypy, pytest.
#
#   bash tests/run.sh [PYTEST ARGUMENT ...]     e.g. bash tests/run.sh -m "not slow"
#
#   RLAR_TEST_VENV  the virtual environment to use, made if missing (default: .venv-test in the checkout)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
venv=${RLAR_TEST_VENV:-$PWD/.venv-test}
bash recipes/install.sh "$venv" cpu,dev
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
