"""What a script prints when something goes wrong, and its exit code."""

import sys
from collections.abc import Callable

import torch

from utils.checkpoint import CheckpointError
from utils.engine import Diverged
from utils.files import InUse
from utils.flags import UsageError
from utils.interruptions import Stopped
from utils.photographs import ImageError
from utils.processes import is_first


def run_script(script: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls main(argv). What the user typed wrong is one line on stderr and exit code 2, what goes wrong 1."""
    try:
        main(argv)
    except (UsageError, InUse) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, CheckpointError, ImageError) as error:
        said = str(error) or type(error).__name__
        line = said.splitlines()[-1].split("ImageError: ")[-1]  # also out of a worker's traceback
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
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ")[0]
        print(f"{script}: {line}: --amp or a smaller --batch_size takes less memory", file=sys.stderr)
        sys.exit(1)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = " ".join(str(error).split("\n\n")[0].split())
        print(f"{script}: --compile does not work here ({what})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume goes on after the last checkpoint", file=sys.stderr)
        sys.exit(130)
