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
    ├── ServiceUnreachable          the run's service does not answer
    └── TooManyUnscored             the run stops: too large a share of responses could not be scored

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


class ServiceUnreachable(RlarError):
    """The run's service did not answer before the deadline."""


class TooManyUnscored(RlarError):
    """Too large a share of the recent responses is unscored; the message names the tools."""
