# SPDX-License-Identifier: Apache-2.0
"""What an LLM is told: prompt files, and texts from elsewhere, quoted.

The prompts are the ``.md`` files in ``prompts/``, Jinja templates. What comes from a hub, a user's data or another
model goes into them, or into a tool's answer, by `Quoter` only.

Guarantees: a template that wants a value it is not given raises an error, and so does one that is given a value it does
not use; nothing that is put in is read as a template. A quoted text stands between two lines with a random mark which
the text itself does not contain, is cut, and holds no control characters, no invisible ones and none that change the
direction of writing. The marks are those of a seed, so that a recorded run can be replayed.

Not covered: whether an LLM heeds it. So nothing that an agent may do depends on that: see `verl_rlar.agents.desk`.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
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


def plain(text: str, limit: int, *, line: bool = False) -> str:
    """A text without what a reader cannot see, cut.

    Args:
        text: The text.
        limit: Most characters; what is left out is counted in what takes its place.
        line: Whether it shall be one line.
    """
    kept = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " if c == "\t" else "" for c in text)
    kept = " ".join(kept.split()) if line else kept.strip()
    left = len(kept) - limit
    return f"{kept[:limit]}… [{left:,} characters left out]" if left > 0 else kept


class Quoter:
    """Quotes texts that nobody vouches for.

    Args:
        seed: What the marks are drawn from.
        limit: Most characters of a text.
    """

    def __init__(self, seed: str, limit: int) -> None:
        self._random = random.Random(seed)
        self.limit = limit

    def quote(self, content: Any, source: str) -> str:
        """A text, or something JSON-like, as quoted text.

        Args:
            content: What is quoted.
            source: Where it is from, in our words.
        """
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1, default=str)
        text = plain(text, self.limit)
        while (mark := f"{self._random.getrandbits(48):012x}") in text:
            pass
        return f"<<<untrusted {mark}: {source}\n{text}\nend {mark}>>>"
