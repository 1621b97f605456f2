# SPDX-License-Identifier: Apache-2.0
"""A conversation as the tokens that a model reads. Runs beside the model's tokenizer, in the server's process.

Guarantees: what a text spells like a special token (``<|im_end|>``) is read as text, so that a response cannot end its
turn and praise itself in the next one; a sequence is never longer than `How.max_length`, BOS and EOS included, nor than
the model's own limit; BOS is never doubled, whether the template or the tokenizer brings it; any string is accepted
(lone surrogates, NUL).

Not covered: templates that refuse a conversation (some take no system prompt, or want turns to alternate) raise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_rlar.serving.judging import Judge


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What goes into the model."""

    ids: list[int]
    types: list[int] | None = None
    """Segment of each token, for encoders that want it."""
    ends: list[int] = field(default_factory=list)
    """Where the model is read, if at each step."""
    truncated: bool = False
    writes: int = 0
    """Most tokens of the answer that is to be written. 0: none is."""
    choice: list[int] | None = None
    """Two tokens between which is to be chosen."""


class Renderer:
    """See the module.

    Args:
        tokenizer: A transformers tokenizer.
        family: See `verl_rlar.serving.base.Family`.
    """

    def __init__(self, tokenizer: Any, family: str) -> None:
        self._tokenizer = tokenizer
        self._family = family
        self.most = int(min(tokenizer.model_max_length, 1 << 30))
        """Most tokens that the model can read, whatever a `How` says."""
        self._bos = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        special = set(tokenizer.all_special_tokens)
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted((token for token in special if len(token) > 1), key=len, reverse=True)

    def render(self, how: Mapping[str, Any], messages: Sequence[Sequence[str]]) -> Rendered:
        """The tokens of a conversation.

        Args:
            how: The fields of a `How`.
            messages: Pairs of role and text, the response last.

        Raises:
            Exception: Whatever the model's template raises for it.
        """
        how = {**how, "max_length": min(how["max_length"], self.most)}
        turns = [{"role": role, "content": self._plain(text)} for role, text in messages]
        if self._family == "judge":
            return self._judged(how, turns)
        if how["system"] is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            if how["system"]:
                turns.insert(0, {"role": "system", "content": how["system"]})
        if how["form"] == "pair":
            return self._pair(how, turns)
        if self._family == "steps":
            return self._steps(how, turns)
        if how["form"] == "chat":
            # an empty response is a response: some templates open a new turn for it, none may be asked to
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
            ids = self._encode(text)
        else:
            ids = self._encode("\n\n".join(turn["content"] for turn in turns))
        return self._fit(how, ids, from_template=how["form"] == "chat")

    def _plain(self, text: str) -> str:
        """The text, with whatever would be read as a special token broken up."""
        text = text.encode("utf-8", "replace").decode()
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fit(self, how: Mapping[str, Any], ids: list[int], *, from_template: bool) -> Rendered:
        """Puts BOS and EOS where they belong, and cuts what is too long between them."""
        bos, eos = self._bos, self._eos
        had_bos = bos is not None and ids[:1] == [bos]
        had_eos = eos is not None and ids[-1:] == [eos]
        if not from_template:
            default = self._tokenizer("", add_special_tokens=True)["input_ids"]
            had_bos, had_eos = (bos in default, eos in default) if default else (False, False)
        start = [bos] if bos is not None and (had_bos if how["bos"] is None else how["bos"]) else []
        end = [eos] if eos is not None and (had_eos if how["eos"] is None else how["eos"]) else []
        while bos is not None and ids[:1] == [bos]:
            ids = ids[1:]
        if eos is not None and ids[-1:] == [eos]:
            ids = ids[:-1]
        kept, truncated = _cut(ids, how["max_length"] - len(start) - len(end), how["truncation"])
        ids = [*start, *kept, *end]
        if not ids:
            raise ValueError("there is not one token to read")
        return Rendered(ids=ids, truncated=truncated)

    def _pair(self, how: Mapping[str, Any], turns: list[dict[str, str]]) -> Rendered:
        first = "\n\n".join(turn["content"] for turn in turns[:-1])
        second = turns[-1]["content"]
        length, self._tokenizer.truncation_side = how["max_length"], how["truncation"]
        whole = self._tokenizer(first, second)
        truncated = len(whole["input_ids"]) > length
        if truncated:
            room = length - self._tokenizer.num_special_tokens_to_add(pair=True)
            fits = len(self._encode(second)) < room  # one token of the prompt must stay
            whole = self._tokenizer(
                first, second, max_length=length, truncation="only_first" if fits else "longest_first"
            )
        return Rendered(ids=list(whole["input_ids"]), types=whole.get("token_type_ids"), truncated=truncated)

    def _judged(self, how: Mapping[str, Any], turns: list[dict[str, str]]) -> Rendered:
        """What a judge is asked; if that is too long, the longest messages are cut down to one length."""
        judge = Judge.from_json(how["judge"])
        choice = None
        if judge.choice is not None:
            choice = [token for word in judge.choice for token in self._encode(word)[:1]]
            if len(set(choice)) != 2:
                raise ValueError(f"{judge.choice!r} do not begin with two different tokens")
        most = how["max_length"] - judge.writes
        rendered = self._question(how, judge, turns)
        parts = [self._encode(turn["content"]) for turn in turns]
        room, truncated = sum(map(len, parts)), False
        while (over := len(rendered.ids) - most) > 0:
            room, truncated = room - over, True
            if room < len(parts):
                raise ValueError(f"what a judge is asked leaves no room for a text in max_length={how['max_length']}")
            lengths = range(max(map(len, parts)) + 1)
            longest = bisect_right(lengths, room, key=lambda most: sum(min(len(part), most) for part in parts)) - 1
            kept = [self._tokenizer.decode(_cut(part, longest, how["truncation"])[0]) for part in parts]
            shorter = [{**turn, "content": text} for turn, text in zip(turns, kept, strict=True)]
            rendered = self._question(how, judge, shorter)
        return Rendered(ids=rendered.ids, truncated=truncated, writes=judge.writes, choice=choice)

    def _question(self, how: Mapping[str, Any], judge: Judge, turns: list[dict[str, str]]) -> Rendered:
        asked = [{"role": "user", "content": judge.question([(turn["role"], turn["content"]) for turn in turns])}]
        if how["system"]:
            asked.insert(0, {"role": "system", "content": how["system"]})
        if how["form"] == "chat":
            text = self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(turn["content"] for turn in asked)
            how = {**how, "eos": False}
        ids = self._encode(text + judge.begin)
        return self._fit({**how, "max_length": len(ids) + 2}, ids, from_template=how["form"] == "chat")

    def _steps(self, how: Mapping[str, Any], turns: list[dict[str, str]]) -> Rendered:
        """The conversation step by step, each ended by the step token; what is cut off is not read."""
        token = how["step_token"]
        steps = [step for step in turns[-1]["content"].split(token) if step.strip()] or [""]
        if how["form"] == "chat":
            text = self._tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(turn["content"] for turn in turns[:-1]) + "\n\n"
        ids, ends = self._encode(text), []
        for step in steps:
            ids += self._encode(step) + self._encode(token)
            ends.append(len(ids) - 1)
        bos = self._bos
        if how["bos"] and bos is not None and ids[:1] != [bos]:
            ids, ends = [bos, *ids], [end + 1 for end in ends]
        over = len(ids) - how["max_length"]
        if over <= 0:
            return Rendered(ids=ids, ends=ends)
        if how["truncation"] == "left":
            ids, ends = ids[over:], [end - over for end in ends if end >= over]
        else:
            ids = ids[:-over]
            ends = [end for end in ends if end < len(ids)] or [len(ids) - 1]
        return Rendered(ids=ids, ends=ends, truncated=True)


def _cut(ids: list[int], most: int, side: str) -> tuple[list[int], bool]:
    if len(ids) <= most:
        return ids, False
    return (ids[len(ids) - most :] if side == "left" else ids[:most]), True
