"""Files that are whole whenever the process is killed, and folders that one process at a time writes to."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout  # which torch brings along

from utils.processes import Failure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


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
            os.fsync(file.fileno())
        if previous:
            path.replace(previous)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def lock_folder(folder: Path) -> TextIO | ExitStack:
    """Makes the folder, and locks it as long as what this returns is not closed and the process lives: its kill ends
    the lock.

    Raises:
        InUse: another process has locked it.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a") if fcntl else ExitStack()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): --output names the folder above it") from None
    try:
        if not fcntl:
            file.enter_context(FileLock(folder / LOCK, timeout=0))
            return file
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, a worker that outlives us does not have it
    except (BlockingIOError, PermissionError, Timeout):
        file.close()
        raise InUse(f"another process is training in {folder}: wait for it, or give another --name") from None
    return file
