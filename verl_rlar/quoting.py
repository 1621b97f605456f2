# SPDX-License-Identifier: Apache-2.0
"""Texts that nobody vouches for, quoted for an LLM.

Guarantees: a quoted text stands between two lines with a random mark which the text itself does not contain, is cut,
and holds no control characters, no invisible ones and none that change the direction of writing. The marks are those of
a seed, so that the same talk can be had again.

Not covered: whether an LLM heeds it. So nothing that an LLM may do can depend on that alone.
"""

from __future__ import annotations

import json
import random
import unicodedata
from typing import Any


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
