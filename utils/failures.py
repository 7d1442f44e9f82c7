"""What a script prints when something goes wrong, and its exit code."""

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
from utils.processes import end_workers, is_first

WORKER_DIED = (
    "a worker was killed, most likely for want of memory or of shared memory: fewer --workers need less; --resume goes "
    "on after the last checkpoint"
)


def run_script(script: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls main(argv). What the user typed wrong is one line on stderr and exit code 2, what goes wrong 1."""
    try:
        main(argv)
    except (UsageError, InUse) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, CheckpointError, ImageError) as error:
        said = str(error) or type(error).__name__
        line = said.splitlines()[-1]
        if said.startswith("Caught "):  # in a worker: a traceback, which ends with the error's type and text
            line = line.partition(": ")[2]
        print(f"{script}: {line}", file=sys.stderr)
        sys.exit(1)
    except Diverged as error:
        if is_first():
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as error:
        if is_first():
            print(f"{script}: {error}; the same command with --resume goes on from there", file=sys.stderr)
        sys.exit(error.exit_code)
    except WorkerDied:
        print(f"{script}: {WORKER_DIED}", file=sys.stderr)
        sys.exit(1)
    except MemoryError:
        print(
            f"{script}: there is not enough memory: fewer --workers or a smaller --batch_size need less",
            file=sys.stderr,
        )
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ")[0]
        print(f"{script}: {line}: --amp or a smaller --batch_size takes less memory", file=sys.stderr)
        sys.exit(1)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = " ".join(str(error).split("\n\n")[0].split())
        print(f"{script}: --compile does not work here ({what})", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not (line := of_other_processes(str(error))):
            raise
        print(f"{script}: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume goes on after the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        end_workers()


def of_other_processes(message: str) -> str | None:
    """One line for a RuntimeError of torch that is about a process that died: a loader's worker, or one that torchrun
    started; None for another."""
    too_little = "shared memory(shm)" in message  # raised in the worker, which lives
    if too_little or message.startswith(("DataLoader worker (pid", "Pin memory thread")):
        return WORKER_DIED
    if dist.is_initialized() and any(backend in message.lower() for backend in ("gloo", "nccl")):
        return "another process of this run ended; it says why"
    return None
