"""What a script prints when something goes wrong, and its exit code."""

import errno
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils.checkpoint import CheckpointError
from utils.engine import Diverged
from utils.files import ImageError, InUse
from utils.flags import UsageError
from utils.interruptions import Stopped
from utils.photographs import WorkerDied
from utils.printing import flush_or_drop, print_any_character, say
from utils.processes import allow_open_files, end_workers, is_first

WORKER_DIED = (
    "a worker was killed, most likely for want of memory or of shared memory: fewer --workers need less; --resume goes "
    "on after the last checkpoint"
)
TOO_MANY_FILES = "too many open files: a higher `ulimit -n` allows more, fewer --workers need less"


class TooManyFiles(Exception):
    """More than the system lets this process or its workers open at a time."""


def run_script(script: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls main(argv). What the user typed wrong is one line on stderr and exit code 2, what goes wrong 1."""
    print_any_character()
    try:
        call(main, argv)
    except (UsageError, InUse) as error:
        say(f"{script}: {error}", sys.stderr)
        sys.exit(2)
    except (OSError, CheckpointError, ImageError) as error:
        said = str(error) or type(error).__name__
        line = said.splitlines()[-1].split("ImageError: ")[-1]  # also out of a worker's traceback
        say(f"{script}: {line}", sys.stderr)
        sys.exit(1)
    except TooManyFiles:
        sys.unraisablehook = lambda _: None  # what is half-made, such as a loader, cannot be taken apart
        say(f"{script}: {TOO_MANY_FILES}", sys.stderr)
        sys.exit(1)
    except Diverged as error:
        if is_first():
            say(f"{script}: {error}", sys.stderr)
        sys.exit(1)
    except Stopped as error:
        if is_first():
            say(f"{script}: {error}; the same command with --resume goes on from there", sys.stderr)
        sys.exit(error.exit_code)
    except WorkerDied:
        say(f"{script}: {WORKER_DIED}", sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ")[0]
        say(f"{script}: {line}: --amp or a smaller --batch_size takes less memory", sys.stderr)
        sys.exit(1)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = " ".join(str(error).split("\n\n")[0].split())
        say(f"{script}: --compile does not work here ({what})", sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not (line := of_other_processes(str(error))):
            raise
        say(f"{script}: {line}", sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say(f"{script}: stopped; --resume goes on after the last checkpoint", sys.stderr)
        sys.exit(130)
    finally:
        end_workers()
        flush_or_drop()


def call(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Raises TooManyFiles for whatever torch, multiprocessing and Python's imports raise then."""
    try:
        allow_open_files()
        main(argv)
        if sys.stdout:
            sys.stdout.flush()
    except Exception as error:
        of: BaseException | None = error
        signs = ("Too many open files", "items of ancdata", f"exited unexpectedly with exit code {errno.EMFILE}.")
        while of and not any(words in str(of) for words in signs):
            of = of.__cause__ or of.__context__
        if of:
            raise TooManyFiles from error
        raise


def of_other_processes(message: str) -> str | None:
    """One line for a RuntimeError of torch that is about a process that died: a loader's worker, or one that torchrun
    started; None for another."""
    too_little = "shared memory(shm)" in message  # raised in the worker, which lives
    if too_little or message.startswith(("DataLoader worker (pid", "Pin memory thread")):
        return WORKER_DIED
    if dist.is_initialized() and any(backend in message.lower() for backend in ("gloo", "nccl")):
        return "another process of this run ended; it says why"
    return None
