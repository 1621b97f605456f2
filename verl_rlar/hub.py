# SPDX-License-Identifier: Apache-2.0
"""The hub of models: searched, looked at, and downloaded from, at one commit.

`Hub.search` unites several searches, since tags in the wild are poor. `Hub.inspect` reads everything about a model that
can be known without its weights (files, config, card, the headers of the safetensors files), for `verl_rlar.gate` to
judge. `Hub.fetch` downloads what is needed to load it into the hub's own cache, and gives the local folder: the only
thing that a loader should ever see.

Guarantees:

- Everything is of one commit. Of a weight file, `inspect` reads the header and no byte more. `fetch` takes a fixed list
  of files: weights in safetensors, config, tokenizer, card, licence; never code, never a pickle.
- What was downloaded is what the hub had listed at that commit: sizes, and the SHA-256 or Git's hash where it is given.
- Every wait has a deadline, every reply a size limit. HTTP 429 and 5xx are tried again here, and nowhere else; a pause
  that the hub asks for is kept, or the question fails at once. Each fault is an error of its own (`HubError`).
- A download that ended early goes on where it stopped. What is cached is not asked for again, nor is the hub itself;
  with `rlar.hub.offline` nothing else is. The token goes to the hub, and is not passed on when it redirects elsewhere.
- What the hub says is data: broken or hostile replies are an error, or a fault in the result, never an exception of
  another kind.

The hub's own client (`huggingface_hub`) gives the cache and its locks, endpoint, headers and names. Its requests are
not used: searches have no deadline there, retries are made unseen and as late as a server likes, and bodies have no
limit.

Not covered: files that a hub offers by xet only; a cached file whose bytes changed on the disk later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast
from urllib.parse import quote
from uuid import uuid4

import httpx
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, parse_ratelimit_headers
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from verl_rlar import __version__
from verl_rlar.config import HubConfig
from verl_rlar.errors import (
    ConfigError,
    HubCutShort,
    HubError,
    HubGated,
    HubMismatch,
    HubNotFound,
    HubRateLimited,
    HubUnreachable,
)
from verl_rlar.repository import (
    CARD,
    COMMIT,
    CONFIG,
    GIB,
    INDEX,
    KIB,
    LICENCE_FILE,
    MIB,
    NAME,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Facts,
    HubFile,
    HubModel,
    Tensor,
    facts_of,
    files_of,
    is_plain,
    parse_header,
    shards_of,
)

T = TypeVar("T")
Params = Sequence[tuple[str, str]]
OnProgress = Callable[[str, int, int | None], None]
"""Called with a stage, what is done of it, and its total."""

REPLY_BYTES = 16 * MIB
"""Longest reply to a search or a question about a model."""
CONFIG_BYTES = 256 * KIB
"""Largest config file that is read."""
INDEX_BYTES = 16 * MIB
CARD_BYTES = 64 * KIB
"""Length at which a card is cut."""
HEADER_BYTES = 8 * MIB
"""Longest header of a safetensors file."""
CHUNK_BYTES = MIB

EXPAND = (
    "author", "sha", "lastModified", "createdAt", "downloads", "likes", "gated", "private", "disabled", "pipeline_tag",
    "library_name", "tags", "cardData", "safetensors",
)  # fmt: skip
"""What a search asks for."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One question to the hub; its conditions must all hold."""

    words: str = ""
    """Part of the name."""
    tags: tuple[str, ...] = ()
    """The hub's tags, also ``license:...``, ``dataset:...`` and languages."""
    author: str = ""
    """Owner of the repository."""
    pipeline: str = ""
    """The hub's name of the task, e.g. ``text-classification``."""
    sort: str = "downloads"
    """``downloads``, ``likes``, ``created_at``, ``last_modified`` or ``trending_score``; the highest first."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What searches found."""

    models: tuple[Facts, ...]
    """Each once, in the order in which they were found."""
    faults: tuple[str, ...] = ()
    """Searches that failed, while others did not."""


class _TryAgain(Exception):
    """The hub may answer the same question later."""

    def __init__(self, error: HubError, wait_s: float | None) -> None:
        super().__init__(error)
        self.error, self.wait_s = error, wait_s


def endpoint_of(config: HubConfig) -> str:
    """Address of the hub.

    Raises:
        ConfigError: It is no address.
    """
    endpoint = (config.endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not re.match(r"https?://[^/\s]+", endpoint):
        raise ConfigError(f"rlar.hub.endpoint: {endpoint!r} is no address; write https://HOST")
    return endpoint


class Hub:
    """See the module. Use as ``with``; threads may share it.

    Args:
        config: The settings.
        transport: What carries the requests, e.g. `verl_rlar.agents.cassette`; None: the network.

    Raises:
        ConfigError: The endpoint is no address.
    """

    def __init__(self, config: HubConfig, transport: httpx.BaseTransport | None = None) -> None:
        self.config = config
        self.endpoint = endpoint_of(config)
        self.offline = constants.is_offline_mode() if config.offline is None else config.offline
        self.cache = Path(config.cache_dir or constants.HF_HUB_CACHE).expanduser()
        self._has_token = bool(os.environ.get(config.token_env))
        headers = build_hf_headers(
            token=os.environ.get(config.token_env) or False, library_name="verl_rlar", library_version=__version__
        )
        self._client = httpx.Client(
            headers={**headers, "accept-encoding": "identity"},
            timeout=config.timeout_s,
            follow_redirects=True,
            max_redirects=5,
            transport=transport,
        )

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    # --- search -------------------------------------------------------------------------------------------------------

    def search(self, searches: Sequence[Search]) -> Results:
        """Unites searches; at most `rlar.hub.results` models from each.

        Raises:
            HubError: Not one search succeeded; the first one's error.
        """
        found: dict[str, Facts] = {}
        errors: list[HubError] = []
        for search in searches:
            try:
                for facts in self._search(search):
                    found.setdefault(facts.repo, facts)
            except HubError as error:
                errors.append(error)
        if errors and len(errors) == len(searches):
            raise errors[0]
        return Results(models=tuple(found.values()), faults=tuple(map(str, errors)))

    def _search(self, search: Search) -> Iterator[Facts]:
        what = f"search {search.words or ' '.join(search.tags) or search.author or search.pipeline!r}"
        sort = {"created_at": "createdAt", "last_modified": "lastModified", "trending_score": "trendingScore"}
        named = {
            "search": search.words,
            "author": search.author,
            "pipeline_tag": search.pipeline,
            "sort": sort.get(search.sort, search.sort),
            "limit": str(self.config.results),
        }
        params: Params = [
            *(("filter", tag) for tag in search.tags),
            *((name, text) for name, text in named.items() if text),
            *(("expand", name) for name in EXPAND),
        ]
        url: str | None = f"{self.endpoint}/api/models"
        left = self.config.results
        while url and left > 0:
            reply = self._asked(partial(self._read, url, what=what, params=params))
            page = _json(reply.body, what)
            if not isinstance(page, list):
                raise HubMismatch(f"{what}: {self.endpoint} answered with no list of models: is it a hub?")
            yield from filter(None, map(facts_of, page[:left]))
            left -= max(1, len(page))  # so that empty pages end, too
            url, params = self._next(reply), ()

    def _next(self, reply: _Reply) -> str | None:
        """Address of the next page; a page elsewhere is none, as it would get the token."""
        match = re.search(r'<([^>]+)>\s*;\s*rel="?next"?', reply.headers.get("link", ""))
        if not match:
            return None
        try:
            url = httpx.URL(self.endpoint).join(match.group(1))
        except httpx.InvalidURL:
            return None
        home = httpx.URL(self.endpoint)
        return str(url) if (url.scheme, url.host, url.port) == (home.scheme, home.host, home.port) else None

    # --- look ---------------------------------------------------------------------------------------------------------

    def inspect(self, repo: str, revision: str | None = None) -> HubModel:
        """Reads what can be known about a model before its weights are loaded.

        Headers of the weights are read only if the weights fit `rlar.hub.max_gb`.

        Args:
            repo: Owner and name.
            revision: A commit, branch or tag; None: the newest commit of the default branch.

        Raises:
            HubNotFound, HubGated, HubRateLimited, HubUnreachable: As they say.
            HubMismatch: The hub's answer is broken.
            HubError: The name cannot be one.
        """
        if not NAME.fullmatch(repo):
            raise HubError(f"{repo[:200]!r} is no name of a repository; write OWNER/NAME")
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        url, params = f"{self.endpoint}/api/models/{repo}{at}", [("blobs", "true")]
        what = f"{repo} at {revision}" if revision else repo
        info = _json(self._asked(lambda: self._read(url, what=what, params=params)).body, what)
        facts = facts_of(info)
        if facts is None or not facts.commit:
            raise HubMismatch(f"{what}: {self.endpoint} answered with no model and its commit: is it a hub?")
        if facts.repo.lower() != repo.lower():
            raise HubMismatch(f"{what}: the hub answered with {facts.repo}; if it was renamed, ask for that name")
        if revision and COMMIT.fullmatch(revision) and facts.commit != revision:
            raise HubMismatch(f"{what}: the hub answered with commit {facts.commit}")
        return self._look_into(facts, files_of(info))

    def _look_into(self, facts: Facts, files: tuple[HubFile, ...]) -> HubModel:
        by_path = {file.path: file for file in files}
        faults: dict[str, str] = {}

        def text(path: str, cap: int, *, cut: bool = False) -> str:
            if path not in by_path:
                return ""
            if by_path[path].size > cap and not cut:
                faults[path] = f"{by_path[path].size:,} bytes; at most {cap:,} are read"
                return ""
            end = min(cap, by_path[path].size)
            return self._bytes(facts, path, 0, end).decode("utf-8", "replace") if end else ""

        def mapping(path: str, cap: int) -> Mapping[str, Any] | None:
            if path not in by_path or not (content := text(path, cap)):
                return None
            with suppress(HubMismatch):
                value = _json(content.encode(), path)
                if isinstance(value, dict):
                    return cast(Mapping[str, Any], value)
            faults[path] = "no JSON object"
            return None

        weights: tuple[HubFile, ...] = ()
        tensors: Mapping[str, Tensor] | None = None
        config = tokenizer_config = None
        card = licence_text = closed = ""
        try:
            config = mapping(CONFIG, CONFIG_BYTES)
            tokenizer_config = mapping(TOKENIZER_CONFIG, 16 * CONFIG_BYTES)
            card = text(CARD, CARD_BYTES, cut=True)
            licence_file = next((path for path in sorted(by_path) if LICENCE_FILE.fullmatch(path)), "")
            licence_text = text(licence_file, 4 * KIB, cut=True)
            if WEIGHTS in by_path:
                weights = (by_path[WEIGHTS],)
            elif INDEX in by_path:
                weights = shards_of(mapping(INDEX, INDEX_BYTES), by_path, faults)
            if weights and sum(file.size for file in weights) <= self.config.max_gb * GIB:
                tensors = self._tensors(facts, weights, faults)
        except HubGated as error:
            closed = str(error)
        return HubModel(
            facts=facts,
            files=files,
            weights=weights,
            config=config,
            tokenizer_config=tokenizer_config,
            card=card,
            licence_text=licence_text,
            tensors=tensors,
            closed=closed,
            faults=faults,
        )

    def _tensors(
        self, facts: Facts, weights: tuple[HubFile, ...], faults: dict[str, str]
    ) -> Mapping[str, Tensor] | None:
        """The tensors of all files; None if one of the headers is broken."""
        tensors: dict[str, Tensor] = {}
        for file in weights:
            try:
                length = int.from_bytes(self._bytes(facts, file.path, 0, 8), "little") if file.size > 8 else 0
                if not 2 <= length <= min(HEADER_BYTES, file.size - 8):
                    raise ValueError(f"its header would be {length:,} bytes long, the file is {file.size:,}")
                header = self._bytes(facts, file.path, 8, 8 + length)
                found = parse_header(header, file.size - 8 - length)
                if both := sorted(found.keys() & tensors.keys()):
                    raise ValueError(f"tensor {both[0]!r} is in another file, too")
            except ValueError as error:
                faults[file.path] = str(error)
                return None
            tensors |= found
        return tensors

    def _bytes(self, facts: Facts, path: str, begin: int, end: int) -> bytes:
        """Bytes of a file, of which there are so many."""
        what = f"{path} of {facts.repo}"
        url = self._url(facts.repo, facts.commit, path)
        reply = self._asked(lambda: self._read(url, what=what, span=(begin, end), commit=facts.commit))
        if len(reply.body) != end - begin:
            raise HubCutShort(f"{what}: {len(reply.body):,} bytes came instead of {end - begin:,}; try again")
        return reply.body

    def _url(self, repo: str, commit: str, path: str) -> str:
        return f"{self.endpoint}/{repo}/resolve/{commit}/{quote(path)}"

    # --- download -----------------------------------------------------------------------------------------------------

    def local(self, repo: str, commit: str) -> Path | None:
        """The folder of a model that was downloaded whole; None if it was not. The hub is not asked."""
        if not NAME.fullmatch(repo) or not COMMIT.fullmatch(commit):
            return None
        storage = self._storage(repo)
        try:
            listed = json.loads((storage / "rlar" / f"{commit}.json").read_text())
            files = [HubFile(path=item["path"], size=item["size"]) for item in listed]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        snapshot = storage / "snapshots" / commit
        return snapshot if all(_has(snapshot / file.path, file.size) for file in files) else None

    def fetch(self, model: HubModel, on_progress: OnProgress | None = None) -> Path:
        """Downloads what is needed to load a model, and nothing else; what is cached is not asked for again.

        Whether it should be loaded is for `verl_rlar.gate` to say, before.

        Returns:
            A folder of the cache that holds these files as they are at the commit.

        Raises:
            HubUnreachable: Among others, it is not cached and we are offline.
            HubCutShort: The download ended early, or reached its deadline.
            HubMismatch: A file is not what was listed; it was deleted.
            HubGated, HubNotFound, HubRateLimited: As they say.
            HubError: There is not enough room.
        """
        if cached := self.local(model.repo, model.commit):
            return cached
        if not NAME.fullmatch(model.repo) or not COMMIT.fullmatch(model.commit):
            raise HubError(f"{model.repo[:200]!r} at {model.commit[:80]!r} is no repository at a commit")
        if not model.weights:
            raise HubError(f"{model.repo} has no weights in safetensors that could be loaded; nothing was downloaded")
        storage = self._storage(model.repo)
        snapshot = storage / "snapshots" / model.commit
        wanted = [file for file in model.wanted if not _has(snapshot / file.path, file.size)]
        total = sum(file.size for file in wanted)
        deadline = time.monotonic() + self.config.download_timeout_s
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if on_progress:
                on_progress(model.repo, done, total)

        try:
            for folder in (storage / "blobs", snapshot, storage / "rlar"):
                folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(storage).free
            if free < total:
                raise HubError(
                    f"{model.repo} needs {total / GIB:.2f} GiB in {self.cache}, where {free / GIB:.2f} GiB are free; "
                    "make room, or set rlar.hub.cache_dir"
                )
            for file in wanted:
                self._download(model, file, storage, deadline, on_bytes)
            record = [{"path": file.path, "size": file.size} for file in model.wanted]
            place = storage / "rlar" / f"{model.commit}.json"
            aside = place.with_suffix(f".{uuid4().hex}")
            aside.write_text(json.dumps(record))
            os.replace(aside, place)
        except OSError as error:
            raise HubError(f"{model.repo} cannot be kept in {self.cache}: {error.strerror or error}") from error
        return snapshot

    def _storage(self, repo: str) -> Path:
        return self.cache / repo_folder_name(repo_id=repo, repo_type="model")

    def _download(
        self, model: HubModel, file: HubFile, storage: Path, deadline: float, on_bytes: Callable[[int], None]
    ) -> None:
        """Brings one file into the cache: its content under its hash, and a link to it in the snapshot."""
        if not is_plain(file.path):
            raise HubMismatch(f"{model.repo} lists a file {file.path!r}, which is no plain name")
        what = f"{file.path} of {model.repo}"
        name = file.sha256 or file.blob
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            raise HubMismatch(f"{what}: the hub gives no hash of it")
        blob, part = storage / "blobs" / name, storage / "blobs" / f"{name}.incomplete"
        lock = self.cache / ".locks" / storage.name / f"{name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with WeakFileLock(lock, timeout=max(0.001, deadline - time.monotonic())):
                if not _has(blob, file.size):
                    self._asked(lambda: self._stream(model, file, part, deadline, on_bytes))
                    if not _is(part, file):
                        part.unlink()
                        raise HubMismatch(f"{what}: its content is not what the hub lists; it was deleted")
                    os.replace(part, blob)
        except TimeoutError:
            raise HubUnreachable(f"{what}: another process downloads it, and was not done in time") from None
        link = storage / "snapshots" / model.commit / file.path
        aside = link.with_name(f".{uuid4().hex}")
        try:
            aside.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # a file system without links
            shutil.copyfile(blob, aside)
        os.replace(aside, link)

    def _stream(
        self, model: HubModel, file: HubFile, part: Path, deadline: float, on_bytes: Callable[[int], None]
    ) -> None:
        """Appends what is missing to a part of a file, up to the size that was listed."""
        what, url = f"{file.path} of {model.repo}", self._url(model.repo, model.commit, file.path)
        with open(part, "ab") as sink:
            if (done := sink.tell()) > file.size:
                done = sink.truncate(0)
            if done == file.size:
                return
            headers = {"range": f"bytes={done}-"} if done else {}
            with self._open(url, what, headers=headers, commit=model.commit, size=file.size) as response:
                if done and not _starts_at(response, done):
                    done = sink.truncate(0)
                on_bytes(done)
                for chunk in self._chunks(response, what, deadline):
                    if done + len(chunk) > file.size:
                        sink.truncate(0)
                        raise HubMismatch(f"{what}: more bytes came than the {file.size:,} that the hub lists")
                    sink.write(chunk)
                    done += len(chunk)
                    on_bytes(len(chunk))
            sink.flush()
            os.fsync(sink.fileno())
            if done < file.size:
                sink.truncate(0)
                raise HubMismatch(f"{what}: {done:,} bytes came, the hub lists {file.size:,}")

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _asked(self, ask: Callable[[], T]) -> T:
        """Asks, and asks again where that may help: the one place of retries."""

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait_s if isinstance(error, _TryAgain) else None
            return min(self.config.max_wait_s, 0.5 * 2**state.attempt_number if asked is None else asked)

        stop = stop_after_attempt(1 + self.config.retries)
        try:
            return Retrying(stop=stop, wait=wait, retry=retry_if_exception_type(_TryAgain), reraise=True)(ask)
        except _TryAgain as last:
            raise last.error from None

    def _read(
        self,
        url: str,
        *,
        what: str,
        params: Params = (),
        span: tuple[int, int] | None = None,
        commit: str | None = None,
    ) -> _Reply:
        """A reply that is read whole; of a file, the bytes from the first up to, not including, the last of `span`."""
        deadline = time.monotonic() + self.config.timeout_s
        begin, end = span or (0, REPLY_BYTES)
        headers = {"range": f"bytes={begin}-{end - 1}"} if span else {}
        body = bytearray()
        with self._open(url, what, headers=headers, params=params, commit=commit) as response:
            skip = begin if span and not _starts_at(response, begin) else 0
            for chunk in self._chunks(response, what, deadline):
                body += chunk
                if len(body) - skip >= end - begin and span:
                    break
                if len(body) > REPLY_BYTES + skip:
                    raise HubMismatch(f"{what}: the answer is longer than {REPLY_BYTES >> 20} MiB")
            return _Reply(body=bytes(body[skip : skip + end - begin]), headers=dict(response.headers))

    @contextmanager
    def _open(
        self,
        url: str,
        what: str,
        *,
        headers: dict[str, str],
        params: Params = (),
        commit: str | None = None,
        size: int | None = None,
    ) -> Iterator[httpx.Response]:
        """A reply whose status is good, before its body is read."""
        if self.offline:
            raise HubUnreachable(
                f"{what} is not in the cache {self.cache}, and the hub may not be asked: offline mode "
                "(rlar.hub.offline, HF_HUB_OFFLINE)"
            )
        try:
            request = self._client.build_request(
                "GET", url, params=httpx.QueryParams(list(params)) if params else None, headers=headers
            )
            response = self._client.send(request, stream=True)
        except httpx.TimeoutException as error:
            raise HubUnreachable(
                f"{what}: {self.endpoint} did not answer within {self.config.timeout_s:g} s; try again, or raise "
                "rlar.hub.timeout_s"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise HubUnreachable(
                f"{what}: {self.endpoint} cannot be reached ({error}); check network and address"
            ) from error
        try:
            self._check(response, what)
            for reply in (*response.history, response):
                said = reply.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
                if commit and said and said != commit:
                    raise HubMismatch(f"{what}: the hub sends commit {said} instead of {commit}")
                linked = reply.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE)
                if size is not None and linked and linked != str(size):
                    raise HubMismatch(f"{what}: the hub lists {size:,} bytes, and now says {linked[:20]}")
            yield response
        finally:
            response.close()

    def _chunks(self, response: httpx.Response, what: str, deadline: float) -> Iterator[bytes]:
        """The body, piece by piece, until the deadline."""
        try:
            for chunk in response.iter_raw():
                yield chunk
                if time.monotonic() > deadline:
                    raise HubCutShort(f"{what}: not done at its deadline; try again, or raise rlar.hub's timeouts")
        except httpx.TimeoutException as error:
            raise HubCutShort(f"{what}: nothing more came for {self.config.timeout_s:g} s; try again") from error
        except httpx.HTTPError as error:
            raise HubCutShort(f"{what}: the connection ended before the end ({error}); try again") from error

    def _check(self, response: httpx.Response, what: str) -> None:
        """Raises what a status means."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status < 300:
            return
        detail = "".join(c for c in response.headers.get("x-error-message", "") if c.isprintable())[:200]
        detail = f" ({detail})" if detail else ""
        if status == 429:
            wait_s = _pause(response.headers)
            limited = HubRateLimited(
                f"{what}: {self.endpoint} wants a pause{'' if wait_s is None else f' of {wait_s:g} s'} (HTTP 429); "
                f"try later, or set a token in {self.config.token_env} for a higher limit"
            )
            limited.retry_after_s = wait_s
            if wait_s is not None and wait_s > self.config.max_wait_s:
                raise limited
            raise _TryAgain(limited, wait_s)
        if status >= 500:
            broken = HubUnreachable(
                f"{what}: {self.endpoint} has a fault of its own (HTTP {status}){detail}; try later"
            )
            raise _TryAgain(broken, None)
        if code == "GatedRepo":
            raise HubGated(
                f"{what} is gated{detail}: accept its terms on its page, and set a token that may read it in "
                f"{self.config.token_env}"
            )
        if (
            code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound")
            or status in (404, 410)
            or "disabled" in detail
        ):
            hint = "; it may be private" if code == "RepoNotFound" and not self._has_token else ""
            raise HubNotFound(f"{what} is not on {self.endpoint} (any more){detail}{hint}; check the name")
        if status in (401, 403):
            raise HubGated(f"{what}: the hub does not let us in (HTTP {status}){detail}; check {self.config.token_env}")
        raise HubMismatch(f"{what}: {self.endpoint} answered with HTTP {status}{detail}: is it a hub?")


@dataclass(frozen=True, kw_only=True)
class _Reply:
    body: bytes
    headers: Mapping[str, str]


def _json(body: bytes, what: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HubMismatch(f"{what}: the answer is no JSON: is it a hub?") from None


def _pause(headers: httpx.Headers) -> float | None:
    """Seconds that the hub wants to be left alone; None if it does not say."""
    if (text := headers.get("retry-after", "").strip()).isdecimal():
        return float(text[:9])
    limits = parse_ratelimit_headers(headers)
    return float(limits.reset_in_seconds) if limits and limits.remaining == 0 else None


def _starts_at(response: httpx.Response, begin: int) -> bool:
    """Whether a body is the wanted part of a file, and not the file from its start."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {begin}-")


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _is(path: Path, file: HubFile) -> bool:
    """Whether a file has the content that was listed: its SHA-256, or Git's hash."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.blob)
