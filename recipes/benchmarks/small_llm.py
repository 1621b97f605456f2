# SPDX-License-Identifier: Apache-2.0
"""A small language model behind an OpenAI-compatible endpoint on the loopback: transformers' `generate`, one at a time.

    python recipes/benchmarks/small_llm.py FOLDER [--port 8000]     # FOLDER: a model as transformers saves it

It is there to see what our agents do with a model that cannot do their work (`coder_hopeless.py`).

Guarantees: `usage` is what was asked and what was written, in tokens; `SmallLlm` keeps it; an answer has at most the
tokens that were asked for; one that does not fit into the model's context is HTTP 400. What a request has in common
with the one before, at its beginning, is not computed again.

Not covered: streaming, tools, several answers, anything that a real server is for.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class SmallLlm:
    """See the module. Use as ``with``.

    Args:
        folder: The model.
        port: Where it listens; 0: any.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        torch.set_num_threads(1)  # several would wait for each other wherever something else is at work
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._cache, self._seen = DynamicCache(config=self._model.config), torch.empty(0, dtype=torch.long)
        self._busy = threading.Lock()
        self.name = folder.name
        self.usages: list[tuple[int, int]] = []
        """Tokens read and written, of each call."""
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.llm = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> SmallLlm:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the model says to a request.

        Raises:
            ValueError: It does not fit into the model's context.
        """
        given: Any = self._tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        read = int(given["input_ids"].shape[1])
        room = int(self._model.config.max_position_embeddings) - read
        if room < 1:
            raise ValueError(f"the messages have {read} tokens, and the model's context is {read + room}")
        warmth = float(asked.get("temperature") or 0.0)
        how = {"do_sample": True, "temperature": warmth} if warmth else {"do_sample": False}
        with self._busy, torch.inference_mode():
            kept = self._in_common(given["input_ids"][0])
            self._cache.crop(kept)
            whole = self._model.generate(
                **given,
                past_key_values=self._cache,
                max_new_tokens=min(room, int(asked.get("max_tokens", 256))),
                pad_token_id=self._tokenizer.eos_token_id,
                **how,
            )[0]
            made = whole[read:]
            self._seen = whole[: self._cache.get_seq_length()]
            self.usages.append((read, len(made)))
        said = self._tokenizer.decode(made, skip_special_tokens=True)
        usage = {"prompt_tokens": read, "completion_tokens": len(made), "total_tokens": read + len(made)}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return {"object": "chat.completion", "model": self.name, "choices": [choice], "usage": usage}

    def _in_common(self, ids: torch.Tensor) -> int:
        """Tokens at the beginning that were there in the request before, too; the last one is always read anew."""
        length = min(len(ids) - 1, len(self._seen))
        differs = (ids[:length] != self._seen[:length]).nonzero()
        return int(differs[0]) if len(differs) else length


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    llm: SmallLlm


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            status, reply = 200, self.server.llm.answer(asked)
        except (ValueError, KeyError, TypeError) as error:
            status, reply = 400, {"error": {"message": str(error)}}
        body = json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # who asked is gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with SmallLlm(arguments.folder, arguments.port) as llm:
        print(f"{llm.name} at {llm.url}; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
