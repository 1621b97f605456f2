# SPDX-License-Identifier: Apache-2.0
"""Every error that verl_rlar raises on purpose.

    RlarError
    ├── ConfigError (ValueError)    a setting is wrong; the message names it and what to change
    ├── DataError (ValueError)      a row of the user's data cannot be read
    ├── ToolError                   a tool broke: it raised, or answered something that is no verdict
    │   ├── ToolTimeout             ... or it was still at work at its deadline, and was killed
    │   └── ToolUnavailable         ... or what it needs (a box, a server, an extra) is not here
    ├── LedgerError                 the ledger cannot be opened, read or written
    ├── LibraryError                the library cannot be opened, read or written, or an event is not allowed in it
    │   └── LibraryBusy             ... as another process writes it
    ├── HubError                    the hub of models, or a repository there
    │   ├── HubUnreachable          ... does not answer, in time or without a fault of its own; or we are offline
    │   ├── HubRateLimited          ... does not answer before a while (`retry_after_s`)
    │   ├── HubGated                ... wants a token, another token, or that its terms are accepted
    │   ├── HubNotFound             ... is not there (any more)
    │   ├── HubCutShort             ... sent less than it said
    │   └── HubMismatch             ... sent something else than it said
    ├── ModelRefused                a reward model is refused before its exam: unsafe, or nobody knows how to ask it
    ├── AgentError                  an agent could not do its work
    │   ├── EndpointError           ... as the endpoint of its LLM does not answer, or not as it should
    │   └── CassetteError           ... as a cassette does not hold this traffic, or cannot be read or written
    ├── ServiceUnreachable          the run's service does not answer
    ├── TooManyUnscored             the run stops: too large a share of responses could not be scored
    └── StoppedByAlarm              the run stops: an alarm was raised whose action is ``stop``

Guarantees: each is picklable (errors cross Ray and process pools), so none defines an ``__init__`` of its own; each
message says what happened, to which thing, and what to do about it.
"""


class RlarError(Exception):
    """Base of all errors of this package."""


class ConfigError(RlarError, ValueError):
    """A setting is wrong. The message names the key and what to change."""


class DataError(RlarError, ValueError):
    """A row of the user's data cannot be read. The message names the row."""


class ToolError(RlarError):
    """A tool broke on a sample. Never a score: the outcome is ``failed``."""


class ToolTimeout(ToolError):
    """A tool was still at work at its deadline and was killed."""


class ToolUnavailable(ToolError):
    """A tool cannot run here: what it needs is missing. Trying again does not help."""


class LedgerError(RlarError):
    """The ledger cannot be opened, read or written."""


class LibraryError(RlarError):
    """The library cannot be opened, read or written, or an event is not allowed in it."""


class LibraryBusy(LibraryError):
    """Another process writes the library: in training, the service."""


class HubError(RlarError):
    """The hub of models could not be used. The message names the repository or file."""


class HubUnreachable(HubError):
    """No answer: no connection, none in time, an error of the server, or offline mode."""


class HubRateLimited(HubError):
    """The hub wants a pause that is longer than may be waited, or one too many times."""

    retry_after_s: float | None = None
    """What the hub asked for, in seconds; None: it did not say."""


class HubGated(HubError):
    """The hub does not let us at a repository: its terms must be accepted, or the token is missing or wrong."""


class HubNotFound(HubError):
    """A repository, commit or file is not there, or not any more."""


class HubCutShort(HubError):
    """A download ended early. What came is kept, and the next try goes on from there."""


class HubMismatch(HubError):
    """What came is not what the hub had said: other size, other content, or no reply of a hub at all."""


class ModelRefused(RlarError):
    """A reward model does not get to its exam. The message names it, and says all that speaks against it."""

    reasons: tuple[str, ...] = ()
    """Each of these by itself; they may quote the repository: hostile text."""


class AgentError(RlarError):
    """An agent could not do its work. The message says what stopped it."""


class EndpointError(AgentError):
    """The endpoint of the LLM did not answer in time, or with something else than an answer."""


class CassetteError(AgentError):
    """Recorded traffic is not what is asked for now, or the recording cannot be read. The message names the request or
    the prompt file."""


class ServiceUnreachable(RlarError):
    """The run's service did not answer before the deadline."""


class TooManyUnscored(RlarError):
    """Too large a share of the recent responses is unscored; the message names the tools."""


class StoppedByAlarm(RlarError):
    """An alarm was raised whose action is ``stop``; the message says what was seen, and where."""
