# SPDX-License-Identifier: Apache-2.0
"""Cassettes: the traffic of agents and judges with an LLM and with the hub, recorded in a file, and replayed from it.

A cassette is a file of JSON lines. Its first line says when and for which task it was recorded, from which endpoints
and model, with which prompt files (their SHA-256), with which settings, and who wrote it (`Header`). Then come texts,
each once, under the start of their SHA-256 (`BODY`), and exchanges that point to them. `Recorder` and `Player` are
httpx transports: what uses the network does not know that there is a cassette. A file whose name ends in ``.gz`` is
compressed as a whole.

Guarantees:

- Replay needs no network and reaches none. A request that was not recorded, a conversation that differs in one letter,
  or a prompt file that has changed raises `CassetteError`, which names it.
- No header of a request is kept, of a reply only those named in `KEPT`; addresses of other hosts, to which a hub
  redirects, lose their query, which may hold a signature; a secret that its owner knows and that stands in any text is
  replaced. Bytes of an answer that nobody read are not in the file.
- A cassette is whole or it is none: its last line says so.

How requests are matched: those to the LLM in their order, by their whole content; those to the hub by address and
range, and those to a rubric's judge, which are under way many at a time, by their whole content, repeated ones in their
order, after which the last answer stays.

Not covered: recording through a proxy; answers of more than `MOST_BYTES`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, cast

import httpx

from verl_rlar.errors import CassetteError

VERSION = 1
MOST_BYTES = 16 * 2**20
PLAIN_CHARS = 1500
"""Texts that are longer are kept compressed."""
SECRET = "[secret]"
"""What stands in the place of a secret."""
KEPT = frozenset(
    "content-type content-range link location retry-after ratelimit ratelimit-policy x-error-code x-error-message "
    "x-linked-size x-repo-commit".split()
)
"""Headers of replies that are kept."""

Line = dict[str, Any]
Peer = Literal["llm", "hub", "judge"]
Side = Literal["agent", "scout"]
"""Who asks: the agent in its process, or who started it."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a cassette says about itself."""

    recorded: str
    """When, in ISO format; what depends on the time takes it as now."""
    note: str
    """Who or what wrote the LLM's answers, in words; may be empty."""
    llm: str
    """Base address of the LLM's endpoint."""
    model: str
    hub: str
    """Address of the hub."""
    task: str
    settings: Mapping[str, Any]
    """What shapes the requests."""
    seed: str
    prompts: Mapping[str, str]
    """SHA-256 of the prompt files by name."""
    version: int = VERSION


class Tape:
    """Writes a cassette. Use as ``with``: it is there, and whole, if that ends without an error and `drop`.

    Raises:
        CassetteError: It cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self._written, self._wanted = path, set[str](), True
        self._lock = threading.Lock()
        self._aside = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path, self._aside, "wt")
        except OSError as error:
            raise CassetteError(f"{path} cannot be written: {error.strerror or error}") from None
        self._write({"kind": "header", **asdict(header)})

    def add(self, line: Line) -> None:
        """Writes a line; a text that is there already is left out."""
        with self._lock:  # an agent and a judge are in different threads
            if line["kind"] == "body":
                if line["id"] in self._written:
                    return
                self._written.add(line["id"])
                line = _laid_out(line) if self.path.suffix == ".gz" else line
            self._write(line)

    def drop(self) -> None:
        """Makes that no cassette is left in the end."""
        self._wanted = False

    def _write(self, line: Line) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CassetteError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> Tape:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._wanted:
                self._write({"kind": "end"})
                self._file.close()
                os.replace(self._aside, self.path)
        finally:
            self._file.close()
            self._aside.unlink(missing_ok=True)


def _opened(path: Path, file: Path, mode: Literal["rt", "wt"]) -> TextIO:
    """A cassette's file, by the name that the cassette has."""
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(file, mode, encoding="utf-8"))
    return cast(TextIO, open(file, mode, encoding="utf-8"))


# --- texts and requests -----------------------------------------------------------------------------------------------


def _body(content: bytes) -> Line:
    """A content as a line."""
    line: Line = {"kind": "body", "id": hashlib.sha256(content).hexdigest()[:20]}
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and len(text) <= PLAIN_CHARS:
        return line | {"text": text}
    return line | {"packed": base64.b85encode(zlib.compress(content, 9)).decode()}


def _content(line: Line) -> bytes:
    return line["text"].encode() if "text" in line else zlib.decompress(base64.b85decode(line["packed"]))


def _laid_out(line: Line) -> Line:
    """A content as a line whose text is as it is, for a file that is compressed as a whole."""
    try:
        return {"kind": line["kind"], "id": line["id"], "text": _content(line).decode()}
    except UnicodeDecodeError:
        return line


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _address(url: httpx.URL, base: httpx.URL) -> str:
    """An address as seen from an endpoint; of other hosts, without the query."""
    if (url.scheme, url.host, url.port) != (base.scheme, base.host, base.port):
        return f"{url.scheme}://{url.netloc.decode()}{url.path}"
    path = url.raw_path.decode()
    return path.removeprefix(base.raw_path.decode().rstrip("/")) or "/"


@dataclass(frozen=True)
class _Asked:
    """A request as a cassette knows it."""

    method: str
    path: str
    range: str
    parts: tuple[bytes, ...] = field(repr=False)
    """Its body: of a conversation, each message apart, the last part is all the rest."""

    @property
    def ids(self) -> list[str]:
        return [_body(part)["id"] for part in self.parts]

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f" ({self.range})" if self.range else "")


def _asked(request: httpx.Request, base: httpx.URL, hide: Callable[[bytes], bytes]) -> _Asked:
    content = hide(request.read())
    parts: tuple[bytes, ...] = (content,) if content else ()
    try:
        tree = json.loads(content) if content else None
    except ValueError:
        tree = None
    if isinstance(tree, dict) and isinstance(messages := tree.pop("messages", None), list):
        parts = (*map(_compact, messages), _compact(tree))
    path = hide(_address(request.url, base).encode()).decode()
    return _Asked(request.method, path, request.headers.get("range", ""), parts)


# --- recording --------------------------------------------------------------------------------------------------------


class Recorder(httpx.BaseTransport):
    """Carries requests over the network and keeps what is said.

    Args:
        add: Takes the lines.
        side: Who asks.
        peer: Who is asked.
        base: Address of the endpoint.
        secrets: Texts that must not be kept; none is empty.
        inner: What carries the requests; None: the network.
    """

    def __init__(
        self,
        add: Callable[[Line], None],
        *,
        side: Side,
        peer: Peer,
        base: str,
        secrets: Sequence[str] = (),
        inner: httpx.BaseTransport | None = None,
    ) -> None:
        self._add, self._side, self._peer, self._base = add, side, peer, httpx.URL(base)
        self._secrets = [text.encode() for secret in secrets for text in (json.dumps(secret)[1:-1], secret)]
        self._inner = inner or httpx.HTTPTransport()

    def close(self) -> None:
        self._inner.close()

    def _hide(self, content: bytes) -> bytes:
        for secret in self._secrets:
            content = content.replace(secret, SECRET.encode())
        return content

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = _asked(request, self._base, self._hide)
        line: Line = {"kind": "exchange", "side": self._side, "peer": self._peer, "ask": self._kept(asked)}
        try:
            response = self._inner.handle_request(request)
        except httpx.TransportError as error:
            self._add(line | {"error": self._hide(_told(error).encode()).decode()})
            raise
        headers = {name.lower(): value for name, value in response.headers.items() if name.lower() in KEPT}
        if "location" in headers:
            target = request.url.join(headers["location"])
            at = _address(target, self._base)
            headers["location"] = at if "://" in at else str(target)
        headers = {name: self._hide(value.encode()).decode() for name, value in headers.items()}

        def done(content: bytes, error: str | None) -> None:
            body = _body(self._hide(content))
            self._add(body)
            told = {"status": response.status_code, "headers": headers, "body": body["id"]}
            self._add(line | told | ({"error": self._hide(error.encode()).decode()} if error else {}))

        assert isinstance(response.stream, httpx.SyncByteStream)
        return httpx.Response(response.status_code, headers=response.headers, stream=_Tee(response.stream, done))

    def _kept(self, asked: _Asked) -> Line:
        for part in asked.parts:
            self._add(_body(part))
        return {"method": asked.method, "path": asked.path, "range": asked.range, "body": asked.ids}


class _Tee(httpx.SyncByteStream):
    """A body that is kept as far as it is read."""

    def __init__(self, stream: httpx.SyncByteStream, done: Callable[[bytes, str | None], None]) -> None:
        self._stream, self._done = stream, done
        self._read, self._error, self._open = bytearray(), "", True

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._stream:
                self._read += chunk
                if len(self._read) > MOST_BYTES:
                    raise CassetteError(f"an answer is longer than {MOST_BYTES:,} bytes, too much for a cassette")
                yield chunk
        except httpx.TransportError as error:
            self._error = _told(error)
            raise

    def close(self) -> None:
        self._stream.close()
        if self._open:
            self._open = False
            self._done(bytes(self._read), self._error or None)


class _Given(httpx.BaseTransport):
    """What another transport has brought."""

    def __init__(self, brought: httpx.Response | httpx.TransportError) -> None:
        self._brought = brought

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if isinstance(self._brought, httpx.TransportError):
            raise self._brought
        return self._brought


class LoopRecorder(httpx.AsyncBaseTransport):
    """A `Recorder` for an event loop; an answer is read whole before anything of it is passed on.

    Args:
        record: Makes a recorder around what carries a request.
        inner: What carries the requests; None: the network.
    """

    def __init__(
        self, record: Callable[[httpx.BaseTransport], Recorder], inner: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._record = record
        self._inner = inner or httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None))

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        brought: httpx.Response | httpx.TransportError
        try:
            answer = await self._inner.handle_async_request(request)
            try:
                assert isinstance(answer.stream, httpx.AsyncByteStream)
                content = b"".join([chunk async for chunk in answer.stream])
            finally:
                await answer.aclose()
            brought = httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(content))
        except httpx.TransportError as error:
            brought = error
        return _whole(self._record(_Given(brought)), request)


class LoopPlayer(httpx.AsyncBaseTransport):
    """A `Player` for an event loop."""

    def __init__(self, player: Player) -> None:
        self._player = player

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return _whole(self._player, request)


def _whole(transport: httpx.BaseTransport, request: httpx.Request) -> httpx.Response:
    """A transport's answer, read to its end."""
    answer = transport.handle_request(request)
    assert isinstance(answer.stream, httpx.SyncByteStream)
    try:
        content = b"".join(answer.stream)
    finally:
        answer.close()
    return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(content))


# --- replay -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cassette:
    """A recording that was read."""

    path: Path
    header: Header
    bodies: Mapping[str, bytes]
    exchanges: tuple[Line, ...]

    @classmethod
    def read(cls, path: Path) -> Cassette:
        """Reads a cassette.

        Raises:
            CassetteError: It cannot be read, is none, or was not recorded to its end.
        """
        try:
            with _opened(path, path, "rt") as file:
                lines = [json.loads(line) for line in file]
        except OSError as error:
            raise CassetteError(f"the cassette {path} cannot be read: {error.strerror or error}") from None
        except (ValueError, EOFError, zlib.error):
            raise CassetteError(f"{path} is no cassette: not every line is JSON") from None
        try:
            if lines[-1]["kind"] != "end":
                raise CassetteError(f"the cassette {path} was not recorded to its end; record it again")
            if lines[0].pop("kind") != "header" or lines[0]["version"] != VERSION:
                raise KeyError
            bodies = {}
            for line in lines:
                if line.get("kind") == "body":
                    bodies[line["id"]] = content = _content(line)
                    if _body(content)["id"] != line["id"]:
                        raise CassetteError(f"the cassette {path} was changed: text {line['id']} is not what it was")
            exchanges = tuple(line for line in lines if line.get("kind") == "exchange")
            return cls(path=path, header=Header(**lines[0]), bodies=bodies, exchanges=exchanges)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, zlib.error):
            raise CassetteError(f"{path} is no cassette of version {VERSION}") from None

    def check(self, prompts: Mapping[str, str]) -> None:
        """Sees that the prompt files are those of the recording.

        Args:
            prompts: SHA-256 of those in use, by name.

        Raises:
            CassetteError: One is not; all are named.
        """
        changed = [name for name, digest in self.header.prompts.items() if prompts.get(name) != digest]
        if changed:
            raise CassetteError(
                f"{', '.join(changed)}: not the prompt that {self.path} was recorded with; undo the change, or record "
                "the cassette again"
            )


class Player(httpx.BaseTransport):
    """Answers requests from a cassette.

    Args:
        cassette: The recording.
        side: Who asks.
        peer: Who is asked.
        base: Address of the endpoint, as the requests have it.
    """

    def __init__(self, cassette: Cassette, *, side: Side, peer: Peer, base: str) -> None:
        self._cassette, self._peer, self._base = cassette, peer, httpx.URL(base)
        mine = [e for e in cassette.exchanges if (e["side"], e["peer"]) == (side, peer)]
        self._by_key: dict[tuple[str, ...], list[Line]] = {}
        self._count, self._at = len(mine), 0
        for exchange in mine:
            self._by_key.setdefault(self._key(exchange["ask"], len(self._by_key)), []).append(exchange)

    def _key(self, ask: Line, place: int) -> tuple[str, ...]:
        if self._peer == "judge":
            return tuple(ask["body"])
        return (str(place),) if self._peer == "llm" else (ask["method"], ask["path"], ask["range"])

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = _asked(request, self._base, lambda content: content)
        ask = {"method": asked.method, "path": asked.path, "range": asked.range, "body": asked.ids}
        key = self._key(ask, self._at)
        if not (found := self._by_key.get(key)):
            what = {"llm": f"request {self._at + 1} to the LLM", "judge": _case_of(asked)}.get(self._peer, str(asked))
            raise CassetteError(
                f"{what} is not in {self._cassette.path}, which holds {self._count} to the {self._peer}"
            )
        self._at += 1
        exchange = found.pop(0) if len(found) > 1 else found[0]
        if exchange["ask"]["body"] != asked.ids:
            raise CassetteError(self._difference(exchange["ask"]["body"], asked))
        if "error" in exchange and "status" not in exchange:
            raise _error(exchange["error"], request)
        stream = _Replayed(self._cassette.bodies[exchange["body"]], exchange.get("error"), request)
        return httpx.Response(exchange["status"], headers=exchange["headers"], stream=stream)

    def _difference(self, recorded: Sequence[str], asked: _Asked) -> str:
        where = f"request {self._at} to the {self._peer} is not what {self._cassette.path} has"
        if len(recorded) != len(asked.parts):
            return f"{where}: it has {len(asked.parts) - 1} messages instead of {len(recorded) - 1}"
        place = next(n for n, (was, now) in enumerate(zip(recorded, asked.ids, strict=True)) if was != now)
        was, now = _readable(self._cassette.bodies[recorded[place]]), _readable(asked.parts[place])
        at = next((n for n, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
        what = "its settings or tools differ" if place == len(recorded) - 1 else f"message {place + 1} differs"
        begin = max(0, at - 40)
        return f"{where}: {what} at character {at}: {now[begin : at + 80]!r} instead of {was[begin : at + 80]!r}"


def _case_of(asked: _Asked) -> str:
    """What a judge is asked, in short."""
    said = [_readable(part) for part in asked.parts[:-1]]
    return f"what a judge is asked now ({said[-1][:160] if said else ''!r}...)"


def _readable(part: bytes) -> str:
    """A part of a conversation as a text for people."""
    text = part.decode("utf-8", "replace")
    tree = json.loads(text)
    content = tree.get("content") if isinstance(tree, dict) else None
    return content if isinstance(content, str) else text


def _told(error: httpx.TransportError) -> str:
    """An error as a cassette has it: its kind, and what it says."""
    return f"{type(error).__name__}: {error}"


def _error(told: str, request: httpx.Request) -> httpx.TransportError:
    name, _, said = told.partition(": ")
    kind = getattr(httpx, name, None)
    kind = kind if isinstance(kind, type) and issubclass(kind, httpx.TransportError) else httpx.TransportError
    return kind(said, request=request)


class _Replayed(httpx.SyncByteStream):
    """A body, and how it ended."""

    def __init__(self, content: bytes, error: str | None, request: httpx.Request) -> None:
        self._content, self._error, self._request = content, error, request

    def __iter__(self) -> Iterator[bytes]:
        if self._content:
            yield self._content
        if self._error:
            raise _error(self._error, self._request)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """How an agent, or who started it, reaches others: over the network, recorded or not, or by a cassette."""

    side: Side
    add: Callable[[Line], None] | None = None
    """Takes what is recorded; None: nothing is."""
    cassette: Cassette | None = None
    """What is replayed; None: the network is used."""
    secrets: tuple[str, ...] = ()
    """Texts that must not be recorded."""

    def to(self, peer: Peer, base: str) -> httpx.BaseTransport | None:
        """What carries the requests to an endpoint; None: the network."""
        if self.cassette:
            return Player(self.cassette, side=self.side, peer=peer, base=base)
        if self.add:
            return Recorder(self.add, side=self.side, peer=peer, base=base, secrets=self.secrets)
        return None

    def in_loop(self, peer: Peer, base: str) -> httpx.AsyncBaseTransport | None:
        """The same for an event loop."""
        add = self.add
        if self.cassette:
            return LoopPlayer(Player(self.cassette, side=self.side, peer=peer, base=base))
        if add:
            return LoopRecorder(
                lambda inner: Recorder(add, side=self.side, peer=peer, base=base, secrets=self.secrets, inner=inner)
            )
        return None
