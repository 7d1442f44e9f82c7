"""What the processes of a run, on one machine or on several, must agree on before it starts. Files are read after they
have joined, and what is wrong with them ends all, with a line that the first process says."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import has_checkpoint
from utils.photographs import Photographs
from utils.processes import Failure, gathered_objects, processes

Parts = dict[str, Photographs]

# Flags that each process may have its own value of: where things lie there, and what changes no number.
LOCAL = {"data", "dataset", "output", "threads", "workers", "save_minutes", "skip_corrupt"}


class Disagreement(Failure):
    """The processes are not of one run."""

    exit_code = 2


class Seen(NamedTuple):
    """What a process sees."""

    host: str
    flags: dict[str, object]  # that must be the same
    goes_on: bool  # the run, from a checkpoint in the folder
    images: dict[str, tuple[int, str]] | None  # the fingerprints of train/ and val/; None: complete, or see `error`
    error: Exception | None


def agree(find: Callable[[], Parts | None], flags: dict[str, Any], folder: Path) -> Parts | None:
    """Returns what `find` returns; in all processes None where the first one's run is complete.

    Args:
        find: looks at the files: the images of train/ and val/, or None where the run is complete.
        flags: of this process, all of them.
        folder: of the run.

    Raises:
        Failure, OSError: what `find` raised, in this process or in another; the same in all.
        Disagreement: flags or images differ, or another process than the first has the checkpoint.
    """
    if processes()[1] == 1:
        return find()
    parts, error, goes_on = None, None, False
    try:
        goes_on = flags["resume"] and not flags["evaluate"] and has_checkpoint(folder)
        parts = find()
    except (Failure, OSError) as raised:
        error = raised
    images = parts and {name: part.images.fingerprint for name, part in parts.items()}
    seen = gathered_objects(Seen(socket.gethostname(), of_the_run(flags), goes_on, images, error))
    if refusal := why_not(seen, folder):
        refusal.of_all = True
        raise refusal
    return parts if seen[0].images else None


def of_the_run(flags: dict[str, Any]) -> dict[str, object]:
    """What must be the same in all processes: of a file whether it is named, as it may lie elsewhere there, and of a
    device its type."""
    same = {flag: value for flag, value in flags.items() if flag not in LOCAL}
    same |= {flag: "given" if flags[flag] else "not given" for flag in ("init", "evaluate")}
    return same | {"device": flags["device"].type}


def why_not(seen: list[Seen], folder: Path) -> Exception | None:
    """What all processes must end with, if anything; `seen` by each, in the order of their ranks."""
    first = seen[0]

    def at(rank: int) -> str:
        return f"{seen[rank].host} (process {rank})"

    for rank, other in enumerate(seen):
        for flag, value in first.flags.items():
            if (theirs := other.flags.get(flag)) != value:
                return Disagreement(
                    f"--{flag} is {value} on {at(0)} and {theirs} on {at(rank)}: a run has the same flags in all its "
                    "processes"
                )
    if first.error:
        return first.error
    if first.images is None:
        return None
    for rank, other in enumerate(seen):
        if other.goes_on and not first.goes_on:
            return Disagreement(
                f"the checkpoint of {folder} lies on {at(rank)}, not on {at(0)}, whose process is the first: put "
                f"--output on a file system that both share, or give {other.host} --node_rank 0"
            )
        if other.error:
            return type(other.error)(f"on {at(rank)}: {other.error}")
        for part, listed in first.images.items():
            if other.images[part] != listed:
                names = " of other names" if other.images[part][0] == listed[0] else ""
                return Disagreement(
                    f"{part}/ has {listed[0]} images on {at(0)} and {other.images[part][0]}{names} on {at(rank)}: "
                    "all machines need the same files"
                )
    return None
