#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The recipe in the python of this shell, into which verl-rlar[vllm] is installed; see README.md and --help.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "$(command -v python || command -v python3)" "$here/run.py" "$@"
