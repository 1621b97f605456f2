# SPDX-License-Identifier: Apache-2.0
"""The `rlar` command: scores responses, plans data sets, examines, compares and replays tools, without verl or Ray;
checks the machine, and times the rewards on it; shows a run's library of tools, and changes it; makes a report of a
run; finds reward models on the hub, and fetches them; has verifiers written; fills the gaps of a data set.

Guarantees: with ``--json`` every line of standard output is one JSON object, in ASCII, and nothing else stands there;
counts, faults and progress go to standard error. What a file says is never interpreted: control characters and markup
are shown as text. Input is read as a stream, and results come in its order. Exit codes: 0 all is well; 1 some rows are
bad, or a route's gold answers do not win, or a check of the doctor failed, or an agent brings nothing, or a model is
refused; 2 the command, a setting, the file or the hub is wrong; 130 Ctrl-C, 143 SIGTERM (after the worker processes
have been ended); 141 the reader of the output is gone.
"""

from verl_rlar.cli import bench, build, diff, doctor, exam, fetch, plan, report, rescore, score, scout, tools, write
from verl_rlar.cli.app import app, main, visible

__all__ = [
    "app", "bench", "build", "diff", "doctor", "exam", "fetch", "main", "plan", "report", "rescore", "score", "scout",
    "tools", "visible", "write",
]  # fmt: skip
