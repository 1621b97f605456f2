# SPDX-License-Identifier: Apache-2.0
"""Answers to the rows of a file by a model in vLLM, for `evaluate.py`.

    python recipes/multitask_grpo/generate.py MODEL DATA/test.parquet ANSWERS.jsonl [--samples N]

``MODEL`` is a folder or a repository; verl's checkpoints become one by ``python -m verl.model_merger``. Decoding is the
paper's: temperature 1.0, top-k 50, top-p 0.7.

Not covered: it needs a GPU, and was not run where it was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from verl_rlar.row_files import read_rows
from verl_rlar.rows import plain, query_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", help="JSON lines or Parquet")
    parser.add_argument("answers", type=Path, help="the file that is written")
    parser.add_argument("--samples", type=int, default=1, help="responses to each row (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=5000, help="most tokens of one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    rows = [row for _, row in read_rows(args.rows) if not isinstance(row, Exception)]
    llm = LLM(args.model, tensor_parallel_size=args.tensor_parallel, seed=args.seed)
    sampling = SamplingParams(
        n=args.samples, temperature=1.0, top_p=0.7, top_k=50, max_tokens=args.tokens, seed=args.seed
    )
    talks = [[{"role": turn.role, "content": turn.content} for turn in query_of(row).messages] for row in rows]
    with open(args.answers, "w", encoding="utf-8") as file:
        for row, said in zip(rows, llm.chat(talks, sampling), strict=True):
            for one in said.outputs:
                file.write(json.dumps(plain(dict(row)) | {"response": one.text}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
