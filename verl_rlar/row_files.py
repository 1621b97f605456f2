# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set on disk: JSON lines (``.jsonl``, also gzipped, or ``-`` for standard input), parquet, and an array
of objects in a ``.json`` file.

Guarantees: rows are read one after the other, a file is never held in memory as a whole (but for an array); a row that
cannot be read comes as a `DataError` in its place, and the rest goes on. Blank lines are skipped, but counted.

Not covered: a line is read whole, however long; a parquet file is read in batches of `BATCH` rows.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from verl_rlar.errors import DataError

STDIN = "-"
BATCH = 256
"""Rows of a parquet file that are in memory at a time."""
MARK = b"\xef\xbb\xbf"
"""What some editors put before UTF-8."""

Row = dict[str, Any]


def read_rows(path: str) -> Iterator[tuple[int, Row | DataError]]:
    """The rows of a file, each with its number (line of a text file, else its place), counted from 1.

    Raises:
        DataError: There is no such file, or it cannot be read at all.
    """
    try:
        if path.endswith(".parquet"):
            yield from _parquet(path)
        else:
            with _open(path) as lines:
                yield from _json_array(lines, path) if _is_array(lines, path) else _json_lines(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_some(path: str) -> Iterator[tuple[int, Row | DataError]]:
    """`read_rows` of a file that is no use without rows.

    Raises:
        DataError: It has none, or see `read_rows`.
    """
    empty = True
    for row in read_rows(path):
        empty = False
        yield row
    if empty:
        raise DataError(f"there are no rows in {'standard input' if path == STDIN else path}")


def _open(path: str) -> BinaryIO:
    if path == STDIN:  # a reader of our own: a thread that waits in it must not lock sys.stdin when the process ends
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _is_array(file: BinaryIO, path: str) -> bool:
    if not path.endswith(".json"):
        return False
    start = file.read(80)
    file.seek(0)
    return start.removeprefix(MARK).lstrip().startswith(b"[")


def _json_array(file: BinaryIO, path: str) -> Iterator[tuple[int, Row | DataError]]:
    rows = _parsed(file.read().removeprefix(MARK))
    if isinstance(rows, DataError):
        raise DataError(f"cannot read {path}: {rows}")
    yield from enumerate(map(_object, rows), start=1)


def _json_lines(lines: BinaryIO) -> Iterator[tuple[int, Row | DataError]]:
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(MARK) if number == 1 else line
        if line.strip():
            row = _parsed(line)
            yield number, row if isinstance(row, DataError) else _object(row)


def _parsed(text: bytes) -> Any:
    """What a JSON text says, or a `DataError`."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON that can be read: {str(error).split(';')[0]}")


def _object(row: Any) -> Row | DataError:
    return row if isinstance(row, dict) else DataError(f"a JSON {type(row).__name__}, not an object")


def _parquet(path: str) -> Iterator[tuple[int, Row | DataError]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow, which is not installed: pip install pyarrow") from error
    try:
        with open(path, "rb") as source, ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise DataError(f"{path} is no parquet file that can be read: {str(error)[:200]}") from error
