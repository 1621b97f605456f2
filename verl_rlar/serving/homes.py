# SPDX-License-Identifier: Apache-2.0
"""A folder of its own for each server: its home, temporary files and log.

It lies in the temporary directory and is removed when its server is stopped. Where nobody was left to do that, as the
process that started the server was killed, whoever makes the next one on this machine does it. How that is known: a
folder is somebody's as long as the file `LOCK` in it is locked (flock), by the process that made it or by its server;
the kernel takes the lock away when both are gone, however they went.

Guarantees: no folder is removed while its maker or its server lives, nor one of another user, nor what a link points
to; what cannot be removed is left, without an error.

Not covered: temporary directories whose file system knows no locks: there the folders of killed processes stay, as do
those in which something removed `LOCK`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "rlar-serving-"
LOCK = "lock"


class Home:
    """See the module. Made by `make`."""

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self.lock = lock
        """Descriptor of the lock, for `pass_fds` of its server."""

    @classmethod
    def make(cls) -> Home:
        """Makes one, after those are removed that are nobody's any more. Takes as long as that takes."""
        sweep(Path(tempfile.gettempdir()))
        while True:
            path = tempfile.mkdtemp(prefix=PREFIX)
            lock = os.open(f"{path}/{LOCK}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # there are no locks here, so nobody else gets one either
                return cls(path, lock)
            if os.fstat(lock).st_nlink:
                return cls(path, lock)
            os.close(lock)  # somebody took it for left behind before it was locked

    def remove(self) -> None:
        """Removes it with all that is in it; never raises."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def sweep(folder: Path) -> None:
    """Removes from a temporary directory what is nobody's any more."""
    for place in folder.glob(f"{PREFIX}*"):
        try:
            about = place.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                continue
            lock = os.open(place / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # it is being made, or removed by somebody else
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                shutil.rmtree(place, ignore_errors=True)
        except OSError:
            pass  # it is in use
        finally:
            os.close(lock)
