"""Files that are whole whenever the process is killed, and folders that one process at a time writes to."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout  # which torch brings along

from utils.printing import say
from utils.processes import Failure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
HELD = {errno.EACCES, errno.EAGAIN}  # what lockf raises where another process has the lock
UNABLE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # the file system has no such thing


class ImageError(Failure):
    """An image that cannot be read."""


class InUse(Failure):
    """Another process writes to the folder."""

    exit_code = 2


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Gives a path beside `path` to write to; what was written takes the place of `path` at the end of the block, or
    is removed where the block raises. What was there moves to `previous`, if that is given."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("r+b") as file:
            flush_to_disk(file)
        if previous:
            path.replace(previous)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def lock_folder(folder: Path) -> ExitStack:
    """Makes the folder, and locks it as long as what this returns is not closed and the process lives: its kill ends
    the lock. Where the file system has no locks (Lustre, some NFS and FUSE), it says so and goes on.

    Raises:
        InUse: another process has locked it.
        OSError: it cannot be made.
    """
    held = ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((folder / LOCK).open("a")) if fcntl else None
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): --output names the folder above it") from None
    try:
        if file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, a worker that outlives us has none of it
        else:
            held.enter_context(FileLock(folder / LOCK, timeout=0))
    except OSError as error:
        if isinstance(error, Timeout) or error.errno in HELD:
            held.close()
            raise InUse(f"another process is training in {folder}: wait for it, or give another --name") from None
        say(f"{folder} cannot be locked ({error.strerror}): two runs in it would not be noticed", sys.stderr)
    return held
