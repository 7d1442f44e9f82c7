"""What a script prints when something goes wrong, and its exit code."""

import errno
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils.interruptions import Stopped
from utils.loader import WorkerDied
from utils.printing import flush_or_drop, print_any_character, say
from utils.processes import Failure, allow_open_files, end_workers, is_first, leave


class TooManyFiles(Failure):
    """More than the system lets this process or its workers open at a time."""


def run_script(script: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls main(argv). What the user typed wrong is one line on stderr and exit code 2, what goes wrong 1."""
    print_any_character()
    try:
        call(main, argv)
    except (Exception, KeyboardInterrupt) as error:
        if not (told := line_and_code(error)):
            raise
        of_all = getattr(error, "of_all", False)
        if is_first() or not of_all:
            say(f"{script}: {told[0]}", sys.stderr)
        if of_all:  # gloo aborts a process that exits with its threads alive
            leave()
        sys.exit(told[1])
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
            sys.unraisablehook = lambda _: None  # what is half-made, such as a loader, cannot be taken apart
            raise TooManyFiles(
                "too many open files: a higher `ulimit -n` allows more, fewer --workers need less"
            ) from error
        raise


def line_and_code(error: BaseException) -> tuple[str, int] | None:
    """What is said of it, and the exit code; None of an error of our own code."""
    said = str(error) or type(error).__name__
    match error:
        case Stopped():
            return f"{said}; the same command with --resume goes on from there", error.exit_code
        case Failure() | OSError():
            line = said.splitlines()[-1]
            if said.startswith("Caught "):  # in a worker: a traceback, which ends with the error's type and text
                line = line.partition(": ")[2]
            return line, getattr(error, "exit_code", 1)
        case MemoryError():
            return "there is not enough memory: fewer --workers or a smaller --batch_size need less", 1
        case torch.OutOfMemoryError():
            return f"{said.split('. ')[0]}: --amp or a smaller --batch_size takes less memory", 1
        case torch._dynamo.exc.TorchDynamoException():
            what = " ".join(said.split("\n\n")[0].split())
            return f"--compile does not work here ({what})", 1
        case RuntimeError() if line := of_other_processes(error):
            return line, 1
        case KeyboardInterrupt():
            return "stopped; --resume goes on after the last checkpoint", 130
    return None


def of_other_processes(error: RuntimeError) -> str | None:
    """One line for an error of torch that is about a process that died: a loader's worker, or one that torchrun
    started; None for another."""
    message = str(error)
    too_little = "shared memory(shm)" in message  # raised in the worker, which lives
    if too_little or message.startswith(("DataLoader worker (pid", "Pin memory thread")):
        return str(WorkerDied())
    within = dist.is_initialized() and any(backend in message.lower() for backend in ("gloo", "nccl"))
    if within or isinstance(error, getattr(dist, "DistError", ())):  # the latter before they have joined
        return "another process of this run ended; it says why"
    return None
