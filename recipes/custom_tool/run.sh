#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A reward tool of your own, both ways: the same task, the same exam, the same answers scored.
#
#   bash recipes/custom_tool/run.sh [rule | verifier] [--no-install] [--set KEY=VALUE ...]
#
#   rule      clock.py: a function that you trust; runs in a worker process
#   verifier  clock_verifier.py: a file that nobody has read; runs in a Docker box only, so this part needs an engine
#
# Without a word both. --set goes to every `rlar` command. The library is in runs/custom_tool; a second run adds an exam.
#   RLAR_VENV  the virtual environment to use, made if missing (default: .venv in the checkout)
#   RLAR_RUN   the folder of the run instead of runs/custom_tool
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname -- "$(dirname -- "$here")")
venv=${RLAR_VENV:-$checkout/.venv}
run=$(realpath -m -- "${RLAR_RUN:-$checkout/runs/custom_tool}")
parts="rule verifier" install=yes settings=()
while (($#)); do
  case $1 in
    rule | verifier) parts=$1 ;;
    --no-install) install=no ;;
    --set) settings+=(--set "${2:?--set wants KEY=VALUE}") && shift ;;
    *) sed -n '4,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
  shift
done
if [[ $install == yes ]]; then
  bash "$checkout/recipes/install.sh" "$venv" cpu
  export PATH=$venv/bin:$PATH
fi
cd "$here"
say() { printf '\n== %s\n' "$*"; }

if [[ $parts == *rule* ]]; then
  export PYTHONPATH=$here # so that workers find the module; an installed package needs no such thing
  own=(--set 'tools=["clock:clock_time"]' --set routing.prefer.short_text=clock_time)
  say "the rule: its exam"
  rlar exam clock:clock_time --cases cases.jsonl "${settings[@]}"
  say "the rule: a few answers"
  rlar score answers.jsonl "${own[@]}" "${settings[@]}"
fi

if [[ $parts == *verifier* ]]; then
  say "the verifier: into the library, unread"
  rlar tools add clock_verifier.py --in "$run"
  say "the verifier: its exam, in a box; its card goes into the library"
  rlar exam clock_verifier.py --cases cases.jsonl --in "$run" --then shadow "${settings[@]}"
  rlar tools ls --in "$run"
  say "the verifier: a few answers, by a file for TRL"
  rlar tools export clock_verifier "$run/clock_reward.py" --as trl --in "$run" --force "${settings[@]}"
  PYTHONPATH=$run python score_exported.py
fi
