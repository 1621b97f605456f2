#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs all that the tests need, then runs every check: ruff, mypy, pytest.
#
#   bash tests/run.sh [PYTEST ARGUMENT ...]     e.g. bash tests/run.sh -m "not slow"
#
# With two cores or more, tests run in two processes, file by file; `-n 0` runs them in one.
#
#   RLAR_TEST_VENV    the virtual environment to use, made if missing (default: .venv-test in the checkout)
#   REQUIRE_DOCKER=1  (or CI=true) has a Docker engine installed and started where none answers, which takes root on
#                     Debian or Ubuntu, and ends it; no engine is a failure then. Else the tests that need one are skipped.
#                     Chromium is installed, too, where there is none
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
venv=${RLAR_TEST_VENV:-$PWD/.venv-test}
bash recipes/install.sh "$venv" cpu,dev
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false
if command -v nvidia-smi >/dev/null; then export VERL_PLATFORM=cpu; fi # verl would take the GPU; tests train on the CPU
processes=$(($(nproc) < 2 ? 1 : 2)) # before the next line: nproc obeys it
export OMP_NUM_THREADS=1 # threads of a tiny model spin while they wait for one that has no core: five times the CPU time
ruff check .
ruff format --check .
mypy &
mypy=$!
. tests/engine.sh
trap engine_down EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
if [[ ${REQUIRE_DOCKER:-} == 1 || ${CI:-} == true ]]; then
  engine_up "$processes"
  . tests/browser.sh
  browser_up
elif engine_answers; then
  engine_up || true
fi
wait "$mypy"
if ((processes == 2)) && [[ -z ${RLAR_TEST_ENGINES:-} ]] && engine_answers; then
  processes=1
  engine_say "tests run in one process, as two would count each other's containers in it"
fi
python -m pytest -n "$((processes == 1 ? 0 : processes))" --dist loadfile --no-loadscope-reorder "$@"
