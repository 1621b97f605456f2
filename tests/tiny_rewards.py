# SPDX-License-Identifier: Apache-2.0
"""Tiny reward models, built on the spot by transformers, and a stand-in for a vLLM server that speaks its routes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from verl_rlar.cpu.models import build_tiny
from verl_rlar.serving import Conversation, How, Judge, ServedModel
from verl_rlar.serving.rendering import Renderer
from verl_rlar.types import Message

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}


def talk(response: str, prompt: str = "What is 6 times 7?", system: str | None = None) -> Conversation:
    """A conversation."""
    first = () if system is None else (Message(role="system", content=system),)
    return (*first, Message(role="user", content=prompt), Message(role="assistant", content=response))


def tokenizer(folder: Path) -> Any:
    """The one of the tiny policy."""
    return AutoTokenizer.from_pretrained(build_tiny(folder / "policy"))


def build(folder: Path, kind: str = "qwen2", labels: int = 1, seed: int = 0, **sizes: Any) -> Path:
    """A random model, with outputs that differ enough to tell right from wrong.

    Args:
        folder: Where it goes, under a name of its own.
        kind: ``qwen2``, ``llama`` (names no padding token), ``bert`` (reads pairs), ``steps`` (an output per token) or
            ``judge`` (a language model).
        labels: Number of its outputs.
        seed: Of its weights.
        sizes: Other sizes than `SIZES`.
    """
    made = folder / f"{kind}-{labels}-{seed}"
    if made.exists():
        return made
    fast = tokenizer(folder)
    settings = (
        SIZES | {"vocab_size": len(fast), "num_labels": labels, "bos_token_id": None, "eos_token_id": None} | sizes
    )
    torch.manual_seed(seed)
    model: Any
    if kind == "bert":
        fast = PreTrainedTokenizerFast(
            tokenizer_object=fast.backend_tokenizer,
            cls_token="<|im_start|>",
            sep_token="<|im_end|>",
            pad_token="<|endoftext|>",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
            special_tokens=[(name, fast.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")],
        )
        model = BertForSequenceClassification(BertConfig(**settings, pad_token_id=fast.pad_token_id))
    elif kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**settings, pad_token_id=None))
    elif kind == "steps":
        model = Qwen2ForTokenClassification(
            Qwen2Config(**settings, num_key_value_heads=2, pad_token_id=fast.pad_token_id)
        )
    elif kind == "judge":
        model = Qwen2ForCausalLM(
            Qwen2Config(**settings, num_key_value_heads=2, pad_token_id=fast.pad_token_id, tie_word_embeddings=True)
        )
    else:
        model = Qwen2ForSequenceClassification(
            Qwen2Config(**settings, num_key_value_heads=2, pad_token_id=fast.pad_token_id)
        )
    with torch.no_grad():
        if kind == "judge":
            model.save_pretrained(made)
            fast.save_pretrained(made)
            return made
        head = model.classifier if kind == "bert" else model.score
        head.weight.normal_(std=1.0)
        if kind == "bert":  # as it is drawn, all texts look alike to it
            for weight in model.bert.parameters():
                weight *= 5 if weight.dim() > 1 else 1
    model.save_pretrained(made)
    fast.save_pretrained(made)
    return made


def served(path: Path, how: How | None = None, **fields: Any) -> ServedModel:
    """A model in a folder."""
    return ServedModel(name=f"test/{path.name}@1", revision="1", path=str(path), how=how or How(), **fields)


def directly(path: Path, how: How, conversations: Sequence[Conversation], family: str = "sequence") -> list[float]:
    """Scores by transformers itself, one by one."""
    from transformers import AutoModelForTokenClassification

    kind: Any = AutoModelForSequenceClassification if family == "sequence" else AutoModelForTokenClassification
    model, fast = kind.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    scores = []
    for conversation in conversations:
        turns = [{"role": message.role, "content": message.content} for message in conversation]
        if how.form == "chat":
            inputs = fast.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        elif how.form == "pair":
            inputs = fast(turns[0]["content"], turns[-1]["content"], return_tensors="pt")
        else:
            inputs = fast("\n\n".join(turn["content"] for turn in turns), return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
        scores.append(how.value(logits.tolist()))
    return scores


def train(path: Path, wanted: Sequence[tuple[How, Conversation, float]], steps: int = 60) -> None:
    """Teaches a model what to score, and writes it back.

    Args:
        path: Its folder.
        wanted: How it is asked, what, and the score that it should give.
        steps: Of the optimizer, each on all of it.
    """
    model, fast = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    renderer = Renderer(fast, "sequence")
    rendered = [
        renderer.render(how.to_json(), [[message.role, message.content] for message in conversation]).ids
        for how, conversation, _ in wanted
    ]
    longest = max(map(len, rendered))
    ids = torch.tensor([row + [fast.pad_token_id] * (longest - len(row)) for row in rendered])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rendered])
    targets = torch.tensor([target for *_, target in wanted])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.set_num_threads(1)  # of a tiny model on a busy machine
    model.train()
    for _ in range(steps):
        found = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        loss = torch.nn.functional.mse_loss(found, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    model.eval().save_pretrained(path)


BATCH = 24
"""Rows of a step of training."""


def train_tokens(path: Path, wanted: Sequence[tuple[How, Conversation, Any]], epochs: int = 100) -> None:
    """Teaches a judge what to say, or a model of steps how good each step is, and writes it back.

    Args:
        path: Its folder.
        wanted: How it is asked, what, and the text that it should say; or the right column for each step.
        epochs: Most of them.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    judges = wanted[0][0].judge is not None
    kind: Any = AutoModelForCausalLM if judges else AutoModelForTokenClassification
    model, fast = kind.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    renderer = Renderer(fast, "judge" if judges else "steps")
    rows, targets = [], []
    for how, conversation, right in wanted:
        rendered = renderer.render(how.to_json(), [[message.role, message.content] for message in conversation])
        if judges:
            said = [*fast(right, add_special_tokens=False)["input_ids"], fast.eos_token_id]
            rows.append(rendered.ids + said)
            targets.append([-100] * (len(rendered.ids) - 1) + said + [-100])  # each token is read at the one before
        else:
            places = dict(zip(rendered.ends, right, strict=True))
            rows.append(rendered.ids)
            targets.append([places.get(place, -100) for place in range(len(rendered.ids))])
    longest = max(map(len, rows))  # what fills up stands behind, where no token that counts sees it
    ids = torch.tensor([row + [fast.pad_token_id] * (longest - len(row)) for row in rows])
    goal = torch.tensor([row + [-100] * (longest - len(row)) for row in targets])
    head = model.get_output_embeddings() if judges else model.score
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.set_num_threads(1)
    model.train()
    chance = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        worst = 0.0
        for some in torch.randperm(len(rows), generator=chance).split(BATCH):
            counts = goal[some] != -100
            found = head(model.base_model(input_ids=ids[some]).last_hidden_state[counts])
            loss = torch.nn.functional.cross_entropy(found, goal[some][counts])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            worst = max(worst, loss.item())
        if worst < 0.01:
            break
    model.eval().save_pretrained(path)


PLAIN_JUDGE = How(max_length=512, judge=Judge(template="{question}\n{response}\n{mark} yes or no"))
"""How the judge of `teach_judge` is asked to choose."""
RATING_JUDGE = How(max_length=512, judge=Judge(template="{question}\n{response}\nrate", choice=None, answer_tokens=16))
"""How it is asked for a rating."""


def judged_talks(seed: int, count: int) -> list[tuple[Conversation, bool]]:
    """Conversations whose response begins with "right" or "wrong", and which."""
    words, chosen = "forty two is the answer of all sums that people make".split(), random.Random(seed)
    rows = []
    for number in range(count):
        body, good = " ".join(chosen.choices(words, k=chosen.randint(4, 6))), number % 2 == 0
        prompt = " ".join(chosen.choices(words, k=3))
        rows.append((talk(f"{'right' if good else 'wrong'} {body}", prompt=prompt), good))
    return rows


def teach_judge(folder: Path, ways: tuple[How, ...] = (PLAIN_JUDGE, RATING_JUDGE)) -> Path:
    """A judge that finds "right" good, and "wrong" bad, in each of these ways to ask it."""
    path = build(folder, "judge", hidden_size=64)
    wanted: list[tuple[How, Conversation, Any]] = []
    for one, good in judged_talks(seed=0, count=48):
        for how in ways:
            assert how.judge is not None
            rates = how.judge.choice is None
            wanted.append((how, one, f"Rating: {9 if good else 2}" if rates else "yes" if good else "no"))
    train_tokens(path, wanted)
    return path


def teach_steps(folder: Path) -> Path:
    """A process reward model for which steps with "wrong" in them are bad; column 1 is for good."""
    path, chosen = build(folder, "steps", labels=2, hidden_size=64), random.Random(0)
    wanted: list[tuple[How, Conversation, Any]] = []
    for _ in range(64):
        right = [chosen.random() < 0.5 for _ in range(chosen.randint(1, 6))]
        parts = [f"{'right' if good else 'wrong'} {chosen.choice('abcdef')}" for good in right]
        wanted.append(
            (How(form="plain", max_length=512), talk("\n\n".join(parts), prompt="Go."), list(map(int, right)))
        )
    train_tokens(path, wanted)
    return path


class StandInVllm:
    """A real HTTP server with the routes of ``vllm serve`` that are needed. Its model scores by the length of the text.

    Use as ``with StandInVllm() as server``.
    """

    def __init__(self) -> None:
        self.shift = 0.0
        """What is added to all scores: another model, in short."""
        self.status = 200
        self.body: bytes | None = None
        """An answer in place of the right one."""
        self.hang_s = 0.0
        self.first_words: dict[str, float] = {}
        """What a judge may say first, with logprobs."""
        self.says: str | None = ""
        self.finish = "stop"
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.calls.append(self.path)
                self._send(200, b"" if self.path == "/health" else json.dumps({"data": [{"id": "tiny"}]}).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.calls.append(self.path)
                if self.path.startswith(("/sleep", "/wake_up")):
                    return self._send(200, b"")
                request = json.loads(body)
                outer.requests.append(request)
                time.sleep(outer.hang_s)
                answer = outer.body or json.dumps(outer.answer(request)).encode()
                self._send(outer.status, answer)

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What vLLM answers to ``/classify``, backwards where there are several: an index says which is which."""
        if "max_tokens" in request:
            first = [{"token": word, "logprob": value} for word, value in self.first_words.items()]
            choice = {"index": 0, "message": {"content": self.says}, "finish_reason": self.finish}
            return {"choices": [choice | {"logprobs": {"content": [{"top_logprobs": first}]}}]}
        if "messages" in request:
            lengths = [sum(len(turn["content"]) for turn in request["messages"])]
        else:
            texts = request["input"]
            lengths = [len(text) for text in texts] if isinstance(texts, list) else [len(texts)]
        rows = [
            {"index": index, "probs": [length + self.shift], "num_classes": 1} for index, length in enumerate(lengths)
        ]
        return {"data": rows[::-1]}

    def __enter__(self) -> StandInVllm:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
