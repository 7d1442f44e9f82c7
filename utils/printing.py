"""What a script prints, also where nobody can read it: the terminal is gone (EIO), the pipe is closed (EPIPE), the
locale lacks the character."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def print_any_character() -> None:
    """From now on; one that the locale lacks as \\xe9."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, to stdout unless told, that ends nothing where it cannot be printed: what a training says is also
    in its logs. What a script is asked for, it prints."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        drop(stream)


def flush_or_drop() -> None:
    """At the end, as Python's own flush, where it fails, has a message and an exit code of its own."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            drop(stream)


def drop(stream: TextIO) -> None:
    """What the stream still holds, and all that it will be given, goes nowhere."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
