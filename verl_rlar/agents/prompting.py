# SPDX-License-Identifier: Apache-2.0
"""What an LLM is told: prompt files.

The prompts are the ``.md`` files in ``prompts/``, Jinja templates. What comes from a hub, a user's data or another
model goes into them, or into a tool's answer, by `verl_rlar.quoting.Quoter` only.

Guarantees: a template that wants a value it is not given raises an error, and so does one that is given a value it does
not use; nothing that is put in is read as a template.

Not covered: whether an LLM heeds it. So nothing that an agent may do depends on that: see `verl_rlar.agents.desk`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prompts"


def prompt_files(agent: str = "") -> dict[str, str]:
    """SHA-256 of every prompt file, by its name.

    Args:
        agent: Only those of this agent, whose names begin with its own.
    """
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(FOLDER.glob(f"{agent}*.md"))}


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def render(name: str, values: Mapping[str, Any]) -> str:
    """Fills a prompt file.

    Args:
        name: Its file name.
        values: By the names that stand in it, all of them.

    Raises:
        ValueError: A value is missing, or one is not used.
    """
    from jinja2 import meta

    environment = _environment()
    source = environment.loader.get_source(environment, name)[0]
    wanted = meta.find_undeclared_variables(environment.parse(source))
    if wanted != values.keys():
        raise ValueError(f"{name} wants {sorted(wanted)}, and was given {sorted(values)}")
    return str(environment.get_template(name).render(values))
