# SPDX-License-Identifier: Apache-2.0
"""The process that loads a reward model from a folder and computes with it: the only file here that imports torch.

It is started by `verl_rlar.serving.transformers`, which holds the other end of its one socket. Lines of JSON go both
ways. It says ``{"ready": {...}}`` or ``{"failed": text}`` once, and then answers:

    {"id": 1, "ask": {how}, "conversations": [[[role, text], ...], ...]}    {"id": 1, "answers": [{...}, ...]}
    {"id": 2, "render": {how}, "conversations": [...]}                      {"id": 2, "rendered": [{...}, ...]}
    {"id": 3, "ping": true}                                                 {"id": 3, "busy_s": seconds}
    {"id": 4, "sleep": true} and {"id": 5, "wake": true}                    {"id": 4, "asleep": true}
    {"id": 6, "reload": folder}                                             {"id": 6, "reloaded": true}
    {"cancel": 1}                                                           (nothing)

Conversations of all callers are computed in batches. A batch is formed around the one that waited longest: of others
that begin alike, such as the responses of a GRPO group, or else of others of like length, up to a number of tokens
(padding included). What all of a batch begin with is computed once, if the model can do that: it is a decoder, and gave
the same numbers both ways when it was loaded. While a batch is computed the next one gathers, so nothing waits for
company unless there was some.

Guarantees: from the first line on, before any file of the model is read, the process can open no socket and connect to
nothing (seccomp, where the kernel has it; it says so in ``ready``); only a local folder is read, only safetensors, no
code of the model's; a folder in which weights of the architecture are missing is refused, where transformers would draw
them at random; it ends when the other end of its socket is closed.

Not covered: accelerators (those are vLLM's). With batches, the last digits of a float32 score depend on the company.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import platform
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_rlar.serving.rendering import Rendered, Renderer

LINE_BYTES = 1 << 28
"""Longest line that is read."""
LEAST_FILLED = 0.7
"""Least share of a batch's tokens that is no padding."""
Output = list[list[float]] | tuple[str, bool]
"""Rows of numbers, or what was written, and whether it came to its end by itself."""
MOST_SHARED = 8
"""Most tokens whose memory is kept for a common beginning, for all of the batch, in batches' tokens."""
LEAST_SHARED = 32
"""Fewest tokens that a common beginning must have to be computed once."""


def block_network() -> bool:
    """Denies this process, for good, to make sockets and to connect; False where the kernel cannot do that."""
    machines = {
        "x86_64": (0xC000003E, (41, 42)),
        "aarch64": (0xC00000B7, (198, 203)),
    }  # audit architecture; numbers of socket and connect
    if sys.platform != "linux" or platform.machine() not in machines:
        return False
    arch, denied = machines[platform.machine()]
    numbers = (*denied, 425)  # io_uring_setup: rings can make sockets, too
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | 13  # EACCES
    tests = [(equal, number) for number in numbers] + [(at_least, 0x40000000)]  # x32's calls
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, deny), (load, 0, 0, 0)]
    program += [(code, len(tests) - index, 0, value) for index, (code, value) in enumerate(tests)]
    program += [(give, 0, 0, allow), (give, 0, 0, deny)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.c_char_p(filters), 0, 0) == 0


def block_network_in_python() -> None:
    """The same for calls from Python, where the kernel does not help."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
            raise PermissionError("this process has no network")

    sys.addaudithook(refuse)


class Model:
    """The weights and what computes with them. Its methods block."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        self._settings = settings
        self._folder = settings["path"]
        torch.set_num_threads(settings["threads"])
        self._read_tokenizer()
        self._model: Any = None
        self._shares = False
        if settings["weights"]:
            self.load()

    def load(self) -> None:
        """Reads the weights.

        Raises:
            ValueError: Weights are missing in the folder.
        """
        import transformers

        kinds: dict[str, Any] = {
            "sequence": transformers.AutoModelForSequenceClassification,
            "steps": transformers.AutoModelForTokenClassification,
            "judge": transformers.AutoModelForCausalLM,
        }
        model, found = kinds[self._settings["family"]].from_pretrained(
            self._folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=self._settings["dtype"],
            output_loading_info=True,
        )
        missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        if missing:
            raise ValueError(
                f"the folder has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}: it is no "
                f"trained {type(model).__name__}, and these would be random numbers"
            )
        model.eval()
        self._config = model.config.get_text_config()
        self._pad = self._config.pad_token_id
        if self._settings["family"] == "judge":
            self._ends = _ends(model, self._tokenizer)
            pad = self._pad if self._pad is not None else next(iter(self._ends), 0)
            # whatever the folder wishes (sampling, penalties) is no part of the score
            model.generation_config = transformers.GenerationConfig(eos_token_id=self._ends or None, pad_token_id=pad)
        elif hasattr(self._config, "use_cache"):
            self._config.use_cache = False
        self.renderer.most = min(self.renderer.most, getattr(self._config, "max_position_embeddings", None) or 1 << 30)
        self._model = model
        self._shares = self._can_share()

    def _read_tokenizer(self) -> None:
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=False
        )
        self.renderer = Renderer(self._tokenizer, self._settings["family"])

    def reload(self, folder: str) -> None:
        """Takes up the weights, and the chat template, of another folder, which must be alike but for these.

        Raises:
            ValueError: There are weights that this model does not have, or others are missing.
        """
        from safetensors import safe_open

        self._folder, most = folder, self.renderer.most
        self._read_tokenizer()
        if self._model is None:
            return
        self.renderer.most = most
        own, taken = self._model.state_dict(), set()
        with self._torch.no_grad():
            for path in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    for name in file.keys():
                        if name not in own:
                            raise ValueError(f"{path.name} has a weight {name} that the model does not have")
                        own[name].copy_(file.get_tensor(name))
                        taken.add(own[name].data_ptr())
        missing = sorted(name for name, weight in own.items() if weight.data_ptr() not in taken)
        if missing:
            raise ValueError(f"the folder has no weights for {', '.join(missing[:4])}")

    def unload(self) -> None:
        """Gives the memory of the weights back to the system."""
        self._model = None
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)

    @property
    def shares(self) -> bool:
        """Whether a common beginning is computed once."""
        return self._model is not None and self._shares

    @property
    def about(self) -> dict[str, Any]:
        """What the other side may want to know."""
        known: dict[str, Any] = {"pad": self._pad} if self._model is not None else {}
        if self._model is not None:
            known["labels"] = 1 if self._settings["family"] == "judge" else int(self._model.config.num_labels)
            known["positions"] = getattr(self._config, "max_position_embeddings", None)
            known["shares"] = self._shares
            known["parameters"] = sum(weight.numel() for weight in self._model.parameters())
        return known | {"chat_template": bool(self._tokenizer.chat_template)}

    def compute(self, batch: Sequence[Rendered]) -> list[Output]:
        """The raw outputs, as rows of each sequence, or as what was written, and whether it came to its end."""
        torch, model = self._torch, self._model
        if model is None:
            raise ValueError("the model sleeps")
        if self._settings["family"] == "judge":
            return self._say(batch)
        shared = common([item.ids for item in batch]) if self._shares and len(batch) > 1 else 0
        ends_apart = all(any(token != self._pad for token in item.ids[shared:]) for item in batch)
        if shared >= LEAST_SHARED and ends_apart:  # a decoder is read at its last token that is no padding
            return self._compute_after(batch, shared)
        longest = max(len(item.ids) for item in batch)
        pad = self._padding(batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        types = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, item in enumerate(batch):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
            mask[row, : len(item.ids)] = 1
            if item.types:
                types[row, : len(item.types)] = torch.tensor(item.types)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(item.types for item in batch):
            inputs["token_type_ids"] = types
        with torch.inference_mode():
            logits = model(**inputs).logits.float()
        if self._settings["family"] == "steps":
            return [logits[row, item.ends].tolist() for row, item in enumerate(batch)]
        return [[row] for row in logits.tolist()]

    def _say(self, batch: Sequence[Rendered]) -> list[Output]:
        """What a language model says next: the log-odds of two tokens, or a text."""
        torch, found = self._torch, dict[int, Output]()
        for writes in (False, True):
            rows = [row for row, item in enumerate(batch) if (item.choice is None) == writes]
            if not rows:
                continue
            longest = max(len(batch[row].ids) for row in rows)
            ids = torch.full((len(rows), longest), self._model.generation_config.pad_token_id)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, row in enumerate(rows):
                ids[place, longest - len(batch[row].ids) :] = torch.tensor(batch[row].ids)
                mask[place, longest - len(batch[row].ids) :] = 1
            said = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(1, *(batch[row].writes for row in rows)) if writes else 1,
                output_logits=not writes,
                return_dict_in_generate=True,
            )
            for place, row in enumerate(rows):
                if choice := batch[row].choice:
                    first, second = said.logits[0][place, choice].float().tolist()
                    found[row] = [[first - second]]
                else:
                    found[row] = self._text(said.sequences[place, longest:].tolist()[: batch[row].writes])
        return [found[row] for row in range(len(batch))]

    def _text(self, tokens: list[int]) -> tuple[str, bool]:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        return str(self._tokenizer.decode(tokens[:end], skip_special_tokens=True)), end is not None

    def _compute_after(self, batch: Sequence[Rendered], shared: int) -> list[Output]:
        """The same, where all begin with the same tokens, which are computed once."""
        torch, model = self._torch, self._model
        rest = [item.ids[shared:] for item in batch]
        longest = max(map(len, rest))
        ids = torch.full((len(batch), longest), self._padding(batch))
        mask = torch.zeros((len(batch), shared + longest), dtype=torch.long)
        for row, tokens in enumerate(rest):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : shared + len(tokens)] = 1
        with torch.inference_mode():
            beginning = torch.tensor([batch[0].ids[:shared]])
            cache = model.base_model(input_ids=beginning, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch))
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits.float()
        return [[row] for row in logits.tolist()]

    def _can_share(self) -> bool:
        """Whether this model gives the same outputs if what sequences begin with is computed once."""
        if self._settings["family"] != "sequence" or getattr(self._config, "use_sliding_window", False):
            return False
        tokens = [token for token in range(1, min(self._config.vocab_size, 60)) if token != self._pad]
        batch = [Rendered(ids=[*tokens, *tokens[:end]]) for end in (3, 9)]
        try:
            self._shares = False
            whole: list[Any] = [row[0] for row in self.compute(batch)]
            apart: list[Any] = [row[0] for row in self._compute_after(batch, len(tokens))]
        except Exception:  # an encoder, or a decoder with another sort of memory
            return False
        pairs = [(a, b) for one, other in zip(whole, apart, strict=True) for a, b in zip(one, other, strict=True)]
        close = 1e-4 if self._model.dtype == self._torch.float32 else 0.05
        return all(abs(a - b) <= close * max(1.0, abs(a)) for a, b in pairs)

    def _padding(self, batch: Sequence[Rendered]) -> int:
        """The token that fills up short sequences. Decoders find their last token by it, so where the model names none
        it is one that does not occur."""
        if self._pad is not None:
            return int(self._pad)
        used = {token for item in batch for token in item.ids}
        pad = next(token for token in range(self._config.vocab_size - 1, -1, -1) if token not in used)
        self._config.pad_token_id = pad
        return pad


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(end) for end in ends if end is not None})


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; none of them is all beginning."""
    low, high = (
        min(map(list, sequences)),
        max(map(list, sequences)),
    )  # in lexical order, all others begin like these two
    most = min(map(len, sequences)) - 1
    return next((place for place in range(most) if low[place] != high[place]), most)


@dataclass(eq=False)
class Waiting:
    """A sequence that waits for its batch."""

    rendered: Rendered
    since: float
    call: int
    done: asyncio.Future[Output]


class Batcher:
    """Computes what it is given, in batches; see the module."""

    def __init__(self, model: Model, *, tokens: int, wait_s: float) -> None:
        self._model = model
        self._tokens = tokens
        self._wait_s = wait_s
        self._waiting: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rlar-model")
        self._last = 1
        """Size of the latest batch."""
        self.busy_since: float | None = None
        self.running = asyncio.Lock()
        """Held while the model computes, or goes to sleep."""

    def add(self, rendered: Rendered, call: int) -> asyncio.Future[Output]:
        item = Waiting(rendered, time.monotonic(), call, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._arrived.set()
        return item.done

    def cancel(self, call: int) -> None:
        """Drops what a call that is given up still has in the queue."""
        for item in self._waiting:
            if item.call == call:
                item.done.cancel()
        self._waiting = [item for item in self._waiting if item.call != call]

    async def run(self) -> None:
        """Works for ever."""
        while True:
            await self._gather()
            async with self.running:
                batch = self._take()
                if batch:
                    await self._compute(batch)

    async def in_thread(self, work: Any, *arguments: Any) -> Any:
        """Runs something in the model's own thread."""
        self.busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        finally:
            self.busy_since = None

    async def _gather(self) -> None:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        until = self._waiting[0].since + self._wait_s
        while (
            self._last > 1
            and self._waiting
            and sum(len(item.rendered.ids) for item in self._waiting) < self._tokens
            and (left := until - time.monotonic()) > 0
        ):
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return

    def _take(self) -> list[Waiting]:
        """The one that waited longest, and those that begin alike, or else those of like length, as far as they fit."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        length = len(first.rendered.ids)
        batch = self._alike(first) if self._model.shares else []
        if len(batch) > 1:
            return self._taken(batch)
        batch, longest, filled = [first], length, length
        for item in sorted(self._waiting[1:], key=lambda item: abs(len(item.rendered.ids) - length)):
            longest = max(longest, len(item.rendered.ids))
            filled += len(item.rendered.ids)
            padded = longest * (len(batch) + 1)
            if padded > self._tokens or filled < LEAST_FILLED * padded:
                break
            batch.append(item)
        return self._taken(batch)

    def _alike(self, first: Waiting) -> list[Waiting]:
        """Those that share at least half of the first one's tokens with it."""
        ids = first.rendered.ids
        half = max(len(ids) // 2, LEAST_SHARED)
        start = ids[:half]
        batch, longest, filled = [first], len(ids) - half, len(ids) - half
        for item in self._waiting[1:]:
            own = len(item.rendered.ids) - half
            padded = max(longest, own) * (len(batch) + 1)
            if own < 1 or item.rendered.ids[:half] != start or filled + own < LEAST_FILLED * padded:
                continue
            if half + padded > self._tokens or half * (len(batch) + 1) > MOST_SHARED * self._tokens:
                break
            longest, filled = max(longest, own), filled + own
            batch.append(item)
        return batch

    def _taken(self, batch: list[Waiting]) -> list[Waiting]:
        chosen = set(map(id, batch))
        self._waiting = [item for item in self._waiting if id(item) not in chosen]
        self._last = len(batch)
        return batch

    async def _compute(self, batch: list[Waiting]) -> None:
        try:
            rows = await self.in_thread(self._model.compute, [item.rendered for item in batch])
        except Exception as error:  # the boundary to the model: whatever it raises is an answer to its callers
            for item in batch:
                if not item.done.done():
                    item.done.set_exception(ValueError(f"{type(error).__name__}: {str(error)[:300]}"))
            return
        for item, found in zip(batch, rows, strict=True):
            if not item.done.done():
                item.done.set_result(found)


class Server:
    """Answers the lines of one socket."""

    def __init__(self, model: Model, settings: Mapping[str, Any]) -> None:
        self._model = model
        self._settings = settings
        self._batcher = Batcher(model, tokens=settings["batch_tokens"], wait_s=settings["batch_wait_s"])
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="rlar-texts")
        self._texts_since: float | None = None
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def serve(self, end: socket.socket) -> None:
        """Answers until the other end is closed."""
        reader, self._writer = await asyncio.open_connection(sock=end, limit=LINE_BYTES)
        working = asyncio.ensure_future(self._batcher.run())
        self._say({"ready": self._model.about | {"network_blocked": self._settings["network_blocked"]}})
        while line := await reader.readline():
            message = json.loads(line)
            if "cancel" in message:
                self._batcher.cancel(message["cancel"])
                if call := self._calls.get(message["cancel"]):
                    call.cancel()
                continue
            self._calls[message["id"]] = asyncio.ensure_future(self._answer(message))
        working.cancel()

    def _say(self, message: Mapping[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _answer(self, message: Mapping[str, Any]) -> None:
        try:
            said = await self._do(message)
        except Exception as error:  # the boundary to the caller
            said = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        finally:
            del self._calls[message["id"]]
        self._say({"id": message["id"]} | said)

    async def _do(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if "ping" in message:
            now = time.monotonic()
            since = [start for start in (self._batcher.busy_since, self._texts_since) if start is not None]
            return {"busy_s": now - min(since, default=now)}
        if "sleep" in message:
            async with self._batcher.running:
                await self._batcher.in_thread(self._model.unload)
            return {"asleep": True}
        if "reload" in message:
            async with self._batcher.running:
                await self._batcher.in_thread(self._model.reload, message["reload"])
            return {"reloaded": True}
        if "wake" in message:
            async with self._batcher.running:
                await self._batcher.in_thread(self._model.load)
            return {"asleep": False}
        how = message["render"] if "render" in message else message["ask"]
        rendered = await self._render(how, message["conversations"])
        if "render" in message:
            return {"rendered": [{"error": item} if isinstance(item, str) else asdict(item) for item in rendered]}
        answers = [
            {"error": item} if isinstance(item, str) else self._batcher.add(item, message["id"]) for item in rendered
        ]
        for index, (item, answer) in enumerate(zip(rendered, answers, strict=True)):
            if isinstance(item, Rendered) and isinstance(answer, asyncio.Future):
                answers[index] = {"tokens": len(item.ids), "truncated": item.truncated} | await self._outputs(answer)
        return {"answers": answers}

    @staticmethod
    async def _outputs(answer: asyncio.Future[Output]) -> dict[str, Any]:
        try:
            found = await answer
        except ValueError as error:
            return {"error": str(error)}
        return {"words": found[0], "finished": found[1]} if isinstance(found, tuple) else {"rows": found}

    async def _render(self, how: Mapping[str, Any], conversations: Sequence[Any]) -> list[Rendered | str]:
        loop = asyncio.get_running_loop()

        def all_of_them() -> list[Rendered | str]:
            found: list[Rendered | str] = []
            for messages in conversations:
                try:
                    found.append(self._model.renderer.render(how, messages))
                except Exception as error:  # the model's template says no
                    found.append(f"{type(error).__name__}: {str(error)[:300]}")
            return found

        def timed() -> list[Rendered | str]:
            self._texts_since = time.monotonic()
            try:
                return all_of_them()
            finally:
                self._texts_since = None

        return await loop.run_in_executor(self._texts, timed)


def end_with(other: socket.socket) -> None:
    """Ends this process when the other end of its socket is closed, also while it loads a model."""
    poll = select.poll()
    poll.register(other, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def main() -> None:
    """Serves the model that the first argument describes."""
    settings = json.loads(sys.argv[1])
    end = socket.socket(fileno=settings["socket"])
    threading.Thread(target=end_with, args=(end,), daemon=True).start()
    blocked = block_network()
    if not blocked:
        block_network_in_python()
    try:
        model = Model(settings)
    except Exception as error:  # whatever it is, the other side is told
        end.sendall(json.dumps({"failed": f"{type(error).__name__}: {str(error)[:1000]}"}).encode() + b"\n")
        sys.exit(1)
    asyncio.run(Server(model, settings | {"network_blocked": blocked}).serve(end))
    os._exit(0)  # whatever still computes has nobody to tell


if __name__ == "__main__":
    main()
