# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the hub of models: a real HTTP server that speaks the hub's routes over a folder of repositories.

    python tests/hub_server.py FOLDER [--port PORT]

`FOLDER/OWNER/NAME/` is a repository: its files, and ``.hub.json`` with what the hub knows beside them (``downloads``,
``likes``, ``createdAt``, ``lastModified``, ``gated``, ``disabled``, ``tags``; ``sizes`` lists files that are only
declared; ``parameters`` is what the hub states). The head of ``README.md`` is the card's data. A state of its files is
a commit; `HubServer.refresh` takes in a new one, older ones stay.

Routes: search (filters, search, author, pipeline_tag, sort, limit, pages by Link header, expand), model info (also by
revision, with ``blobs``), tree, resolve (GET, HEAD, Range, ETag, X-Repo-Commit, X-Linked-Size; large files, on wish, by
a redirect to another host name), and the hub's errors (X-Error-Code). `HubServer.requests` counts everything;
`HubServer.faults` breaks what it is told to.

Not covered: xet, uploads, private repositories.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

LARGE = re.compile(r".*\.(?:safetensors|bin|pt|pkl|h5|msgpack|ckpt)")
"""Files that the hub keeps by their SHA-256."""
META = ".hub.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, and what was sent."""

    method: str
    path: str
    """Decoded, without the query."""
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    """Names in lower case."""
    status: int
    sent: int
    """Bytes of the body."""


@dataclass(frozen=True, kw_only=True)
class File:
    size: int
    oid: str
    sha256: str
    content: bytes | None
    """None: only declared."""


@dataclass(kw_only=True)
class Commit:
    sha: str
    files: dict[str, File]
    meta: dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        parts = urlsplit(self.path)
        self.at, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.hub.fault_for(self.at)
        if fault is not None:
            fault(self)
        else:
            self.hub.answer(self)

    do_HEAD = do_GET

    def reply(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        length: int | None = None,
        close: bool = False,
    ) -> None:
        """Sends a whole reply; `length` is what it says about its length, if that is a lie."""
        sent = 0 if self.command == "HEAD" else len(body)
        self.hub.requests.append(
            Request(
                method=self.command,
                path=self.at,
                query=self.query,
                headers={name.lower(): value for name, value in self.headers.items()},
                status=status,
                sent=sent,
            )
        )
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if sent:
            self.wfile.write(body)

    def reply_json(self, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def error(self, status: int, code: str, message: str = "", **headers: str) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.reply(status, json.dumps({"error": message or code}).encode(), told | headers)


Fault = Callable[[Handler], None]
"""What becomes of a request instead of its answer."""


def says(status: int, body: bytes = b"{}", **headers: str) -> Fault:
    """Answers this."""
    return lambda handler: handler.reply(
        status, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def cuts(share: float = 0.5) -> Fault:
    """Answers, but closes the connection after a share of the body."""

    def fault(handler: Handler) -> None:
        content = handler.hub.content_of(handler.at) or b"[]"
        content, headers = handler.hub.span(handler, content)
        handler.reply(
            206 if headers else 200, content[: int(len(content) * share)], headers, length=len(content), close=True
        )

    return fault


def lies(content: bytes) -> Fault:
    """Sends another content than the one that is listed."""
    return lambda handler: handler.reply(200, content)


def hangs(until: threading.Event) -> Fault:
    """Does not answer before something happens."""

    def fault(handler: Handler) -> None:
        until.wait(60)
        handler.close_connection = True

    return fault


def drips(until: threading.Event) -> Fault:
    """Sends a byte now and then, without an end."""

    def fault(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        try:
            while not until.wait(0.05):
                handler.wfile.write(b" ")
        except OSError:
            pass
        handler.close_connection = True

    return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; that is theirs to say."""


@dataclass
class HubServer:
    """See the module. Use as ``with``."""

    folder: Path
    port: int = 0
    page_size: int = 100
    """Most models of a page."""
    redirect: bool = False
    """Whether large files are sent from another host name."""
    tokens: set[str] = field(default_factory=set)
    """Tokens that open gated repositories."""
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[str, Fault, int]] = field(default_factory=list)
    """Pattern of the path, what becomes of it, and how many times."""

    def __enter__(self) -> HubServer:
        self._lock = threading.Lock()
        self._commits: dict[str, dict[str, Commit]] = {}
        """Commits by repository and hash, the newest last."""
        self.refresh()
        self._server = _Server(("127.0.0.1", self.port), Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def refresh(self) -> None:
        """Takes in what changed in the folder: new repositories, new commits, repositories that went."""
        there = {}
        for place in sorted(self.folder.glob("*/*/")):
            repo = f"{place.parent.name}/{place.name}"
            commit = _commit(place)
            there[repo] = {**self._commits.get(repo, {})}
            there[repo].pop(commit.sha, None)
            there[repo][commit.sha] = commit
        self._commits = there

    def sent(self, pattern: str) -> int:
        """Bytes that were sent of paths that match, in all."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def asked(self, pattern: str) -> list[Request]:
        """Requests whose path matches."""
        return [request for request in self.requests if re.search(pattern, request.path)]

    def commit(self, repo: str) -> str:
        """Newest commit."""
        return list(self._commits[repo])[-1]

    # --- answers ------------------------------------------------------------------------------------------------------

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for place, (pattern, fault, times) in enumerate(self.faults):
                if re.search(pattern, path):
                    if times > 1:
                        self.faults[place] = (pattern, fault, times - 1)
                    else:
                        del self.faults[place]
                    return fault
        return None

    def answer(self, handler: Handler) -> None:
        if handler.at == "/api/models":
            self._search(handler)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", handler.at):
            self._model(handler, *match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", handler.at):
            self._file(handler, *match.groups())
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", handler.at):
            self._send(handler, self.content_of(handler.at), {})
        else:
            handler.error(404, "", "no such route")

    def _search(self, handler: Handler) -> None:
        query = handler.query
        found = []
        for repo in self._commits:
            info = self._info(repo, self.commit(repo), blobs=False)
            words, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
            tags = {tag for value in query.get("filter", []) for tag in value.split(",")}
            pipeline = query.get("pipeline_tag", [None])[0]
            if words in repo.lower() and author in ("", info["author"]) and tags <= set(info["tags"]):
                if pipeline in (None, info["pipeline_tag"]):
                    found.append(info)
        sort = query.get("sort", ["trendingScore"])[0]
        found.sort(key=lambda info: (info.get(sort) is not None, info.get(sort), info["id"]), reverse=True)
        begin, limit = int(query.get("cursor", ["0"])[0]), int(query.get("limit", ["1000"])[0])
        page = found[begin : begin + min(self.page_size, limit)]
        headers = {}
        if begin + len(page) < len(found):
            more = urlencode({**query, "cursor": [str(begin + len(page))]}, doseq=True)
            headers["Link"] = f'<{self.url}/api/models?{more}>; rel="next"'
        if names := query.get("expand"):
            page = [{name: info.get(name) for name in ("_id", "id", *names)} for info in page]
        handler.reply_json(page, headers)

    def _model(self, handler: Handler, repo: str, route: str | None, revision: str | None, under: str | None) -> None:
        commit = self._found(handler, repo, revision or "main")
        if commit is None:
            return
        if route != "tree":
            handler.reply_json(self._info(repo, commit.sha, blobs="blobs" in handler.query))
            return
        listed = [
            {
                "type": "file",
                "path": path,
                "size": file.size,
                "oid": file.oid,
                **({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.sha256 else {}),
            }
            for path, file in commit.files.items()
            if path.startswith(f"{under}/" if under else "")
        ]
        if under and not listed:
            handler.error(404, "EntryNotFound")
        else:
            handler.reply_json(listed)

    def _found(self, handler: Handler, repo: str, revision: str) -> Commit | None:
        """A commit; None after the error has been sent."""
        commits = self._commits.get(repo)
        if commits is None:
            handler.error(404, "RepoNotFound", "Repository not found")
        elif list(commits.values())[-1].meta.get("disabled"):
            handler.error(403, "", "Access to this resource is disabled.")
        elif commit := commits.get(self.commit(repo) if revision == "main" else revision):
            return commit
        else:
            handler.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _file(self, handler: Handler, repo: str, revision: str, path: str) -> None:
        commit = self._found(handler, repo, revision)
        if commit is None:
            return
        token = handler.headers.get("authorization", "").removeprefix("Bearer ")
        if commit.meta.get("gated") and token not in self.tokens:
            handler.error(403 if token else 401, "GatedRepo", "Access to this model is restricted")
            return
        file = commit.files.get(path)
        if file is None or file.content is None:
            handler.error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
            return
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            if self.redirect:
                where = {"Location": f"http://localhost:{self.port}/cdn/{file.sha256}"}
                handler.reply(302, b"", headers | where)
                return
        self._send(handler, file.content, headers)

    def _send(self, handler: Handler, content: bytes | None, headers: dict[str, str]) -> None:
        if content is None:
            handler.error(404, "EntryNotFound")
            return
        part, spanned = self.span(handler, content)
        handler.reply(206 if spanned else 200, part, headers | spanned)

    def span(self, handler: Handler, content: bytes) -> tuple[bytes, dict[str, str]]:
        """The part of a content that a request is for, and its headers; no headers: it is the whole."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("range", ""))
        if not match:
            return content, {}
        begin, end = int(match[1]), min(len(content), int(match[2] or len(content)) + 1)
        return content[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}

    def content_of(self, path: str) -> bytes | None:
        """Content of the file that a path of resolve or of large files is for."""
        for repo, commits in self._commits.items():
            for sha, commit in commits.items():
                for name, file in commit.files.items():
                    if path in (f"/{repo}/resolve/{sha}/{name}", f"/cdn/{file.sha256}"):
                        return file.content
        return None

    def _info(self, repo: str, sha: str, *, blobs: bool) -> dict[str, Any]:
        commit = self._commits[repo][sha]
        meta, files = commit.meta, commit.files
        card = _card_data(files)
        config = _json(files.get("config.json"))
        licence = card.get("license")
        languages = card.get("language", [])
        tags = ["transformers"] if config else []
        tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
        tags += [*card.get("tags", []), *meta.get("tags", [])]
        tags += languages if isinstance(languages, list) else [languages]
        tags += [f"license:{licence}"] if licence else []
        siblings: list[dict[str, Any]] = []
        for path, file in files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry |= {"size": file.size, "blobId": file.oid}
                if file.sha256:
                    entry["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": 130}
            siblings.append(entry)
        return {
            "_id": sha[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.partition("/")[0],
            "sha": sha,
            "lastModified": meta.get("lastModified", "2026-01-01T00:00:00.000Z"),
            "createdAt": meta.get("createdAt", "2026-01-01T00:00:00.000Z"),
            "private": False,
            "gated": meta.get("gated", False),
            "disabled": bool(meta.get("disabled")),
            "downloads": meta.get("downloads", 0),
            "likes": meta.get("likes", 0),
            "trendingScore": meta.get("likes", 0),
            "library_name": "transformers" if config else None,
            "tags": list(dict.fromkeys(tags)),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "config": {name: config[name] for name in ("architectures", "model_type", "auto_map") if name in config},
            "safetensors": {"parameters": {"F32": n}, "total": n} if (n := meta.get("parameters")) else None,
            "siblings": siblings,
        }


def _commit(place: Path) -> Commit:
    """The state of a folder."""
    meta = json.loads((place / META).read_text()) if (place / META).exists() else {}
    files: dict[str, File] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file() and path.name != META):
        name, content = path.relative_to(place).as_posix(), path.read_bytes()
        files[name] = File(
            size=len(content),
            oid=hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest() if LARGE.fullmatch(name) else "",
            content=content,
        )
    for name, size in meta.get("sizes", {}).items():
        digest = hashlib.sha256(name.encode()).hexdigest()
        files[name] = File(size=size, oid=digest[:40], sha256=digest, content=None)
    listing = json.dumps([(name, file.oid, file.sha256) for name, file in files.items()])
    sha = hashlib.sha1(f"{place.parent.name}/{place.name} {listing}".encode(), usedforsecurity=False).hexdigest()
    return Commit(sha=sha, files=files, meta=meta)


def _json(file: File | None) -> dict[str, Any]:
    try:
        content = json.loads(file.content or b"") if file else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _card_data(files: Mapping[str, File]) -> dict[str, Any]:
    file = files.get("README.md")
    text = (file.content or b"").decode("utf-8", "replace") if file else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a folder of repositories as a hub of models, on loopback.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with HubServer(args.folder, port=args.port) as server:
        print(f"HF_ENDPOINT={server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
