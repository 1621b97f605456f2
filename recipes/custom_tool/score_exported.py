# SPDX-License-Identifier: Apache-2.0
"""Calls an exported reward function as TRL's trainer would."""

import json
from pathlib import Path

from clock_reward import reward

rows = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()]
prompts, completions, references = ([row[name] for row in rows] for name in ("prompt", "response", "reference"))
for completion, value in zip(completions, reward(prompts, completions, reference=references), strict=True):
    print(f"{'-' if value is None else format(value, 'g'):<5}{completion}")
