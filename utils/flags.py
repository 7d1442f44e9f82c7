"""The flags that both training scripts have, and argparse as they want it: one line on stderr for what the user typed
wrong, exit code 2."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from models.regularizers import METHODS
from utils import record
from utils.checkpoint import CheckpointError
from utils.photographs import ImageError


class Parser(argparse.ArgumentParser):
    """--help shows the script's docstring; no flag can be abbreviated."""

    def __init__(self, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows every flag)\n")


def number(
    kind: type,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` within the bounds."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", at_least), ("at most", at_most), ("above", above), ("below", below))
        if math.isfinite(bound)
    ]
    wanted = f"must be a {'whole ' if kind is int else ''}number, {' and '.join(bounds)}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and at_least <= value <= at_most and above < value < below):
            raise argparse.ArgumentTypeError(f"{wanted}, not {text!r}")
        return value

    return parse


def resnet_depth(text: str) -> int:
    """An argparse type: 6n + 2."""
    if not text.isdecimal() or int(text) < 8 or int(text) % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n + 2 (8, 14, 20, ..., 56, ...), not {text!r}")
    return int(text)


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"must be one folder's name, without separators, not {text!r}")
    return text


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that a tensor can be put on."""
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason})") from None


def add_shared_flags(parser: Parser) -> None:
    """What means the same in both scripts; each sets its own defaults."""
    add = parser.add_argument
    add("--method", choices=METHODS, default="disout")
    add(
        "--dist_prob",
        type=number(float, 0, 1),
        help="share of a map to distort (the method's rate), at the end of training",
    )
    add("--alpha", type=number(float, 0), help="intensity of the distortion")
    add("--block_size", type=number(int, 1), help="side of a block; 1: element-wise")
    add("--inside", action="store_true", help="keep even blocks wholly inside the map (see disout.py)")
    add("--label_smoothing", type=number(float, 0, below=1), default=0.0)
    add("--epochs", type=number(int, 1))
    add("--batch_size", type=number(int, 1))
    add("--lr", type=number(float, above=0))
    add("--momentum", type=number(float, 0, below=1), default=0.9)
    add("--weight_decay", type=number(float, 0))
    add("--warmup_epochs", type=number(int, 0))
    add("--seed", type=number(int, 0), default=0)
    add("--device", type=usable_device, help="default: cuda where there is one, else cpu")
    add("--output", default="results", help="parent of the run's folder")
    add("--name", type=folder_name, help="the run's folder; default: DATASET-resnetDEPTH-METHOD-sSEED")
    add("--resume", action="store_true", help="go on after the last finished epoch; start where there is none")
    add("--evaluate", metavar="FILE", help="only evaluate a checkpoint or a state dict such as best.pt")


def settle(parser: Parser, args: argparse.Namespace) -> dict[str, object]:
    """Fills in the defaults that depend on other flags (`dataset` and `depth` are there already), and refuses a run
    folder that the flags do not fit. Returns the run's settings: every flag that says what the run is, and where."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.name = args.name or f"{args.dataset}-resnet{args.depth}-{args.method}-s{args.seed}"
    for flag in {"dist_prob", "block_size", "alpha", "inside"} - set(METHODS[args.method].settings):
        setattr(args, flag, 0)
    settings = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "evaluate")}
    settings["device"] = str(args.device)

    folder = Path(args.output, args.name)
    if args.evaluate:
        if not Path(args.evaluate).is_file():
            parser.error(f"argument --evaluate: there is no file {args.evaluate}")
    elif not args.resume and folder.is_dir() and any(folder.iterdir()):
        parser.error(f"{folder} holds a run already: add --resume to go on with it, or give another --name")
    elif changed := record.changed_settings(folder, settings):
        parser.error(f"{folder} was started with other settings ({', '.join(changed)}): give another --name")
    return settings


def run_script(script: str, main: Callable[[list[str]], None]) -> None:
    """Calls main(arguments). What goes wrong is one line on stderr and exit code 1."""
    try:
        main(sys.argv[1:])
    except (OSError, CheckpointError, ImageError) as error:
        sys.exit(f"{script}: {str(error).splitlines()[-1]}")  # the last line is the message, also out of a worker
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume goes on after the last finished epoch", file=sys.stderr)
        sys.exit(130)
