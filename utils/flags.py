"""The flags that both training scripts have, and argparse as they want it."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from models.regularizers import METHODS
from utils.checkpoint import CheckpointError, changed_settings, has_checkpoint
from utils.files import LOCK
from utils.processes import Failure, launched


class UsageError(Failure):
    """What the user typed wrong, in one sentence."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """--help shows the script's docstring; no flag can be abbreviated."""

    def __init__(self, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows every flag)\n")


LARGEST = 10**9  # of a whole number that has no other bound: what is larger fits no int64 once multiplied


def number(
    kind: type,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` within the bounds."""
    at_most = min(at_most, LARGEST) if kind is int and at_most == math.inf else at_most
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
        if not (-math.inf < value < math.inf and at_least <= value <= at_most and above < value < below):
            raise argparse.ArgumentTypeError(f"{wanted}, not {text!r}")
        return value

    return parse


def resnet_depth(text: str) -> int:
    """An argparse type: 6n + 2."""
    depth = int(text) if text.isdecimal() and len(text) < 5 else 0
    if depth < 8 or depth % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n + 2 (8, 14, 20, ..., 56, ..., 9998), not {text!r}")
    return depth


def file_path(text: str) -> str:
    """An argparse type: a file or folder. A shell does not expand ~ after =, as in --output=~/runs."""
    found = in_utf8(os.path.expanduser(text))
    if found.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no home folder {text!r}; ./{text} if it is called so")
    return found


def in_utf8(text: str) -> str:
    """The text. No log can hold a name in another encoding, or one that the locale cannot tell."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8 in this locale (LC_ALL=C.UTF-8 is), not {text!r}") from None


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"must be one folder's name, without separators, not {text!r}")
    return in_utf8(text)


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that a tensor can be put on, and read from, which meta is not."""
    try:
        probe = torch.zeros(1, device=text)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason})") from None


def add_shared_flags(parser: Parser) -> None:
    """What means the same in both scripts; each sets its own defaults for what is None here."""

    def add(flag: str, kind: Callable[[str], float], what: str, default: float | None = None) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{what} (default: %(default)s)")

    parser.add_argument("--method", choices=METHODS, default="disout", help="regularizer (default: disout)")
    add("--dist_prob", number(float, 0, 1), "share of a map to distort at the end of training, or the method's rate")
    constant = "dist_prob from the first step on, where it otherwise grows from 0"
    parser.add_argument("--constant_prob", action="store_true", help=constant)
    add("--alpha", number(float, 0), "intensity of the distortion")
    add("--block_size", number(int, 1), "side of a block; 1: element-wise")
    parser.add_argument("--inside", action="store_true", help="keep even blocks wholly inside the map (see disout.py)")
    add("--label_smoothing", number(float, 0, below=1), "of the training loss", 0.0)
    add("--epochs", number(int, 1), "passes over the training images")
    add("--batch_size", number(int, 1), "images of an optimizer step, of all processes together")
    add("--lr", number(float, above=0), "learning rate after the warm-up")
    add("--momentum", number(float, 0, below=1), "of SGD", 0.9)
    add("--weight_decay", number(float, 0), "of SGD, on all parameters")
    add("--warmup_epochs", number(int, 0), "epochs over which the learning rate grows linearly")
    add("--seed", number(int, 0, 2**63 - 1), "of everything that is drawn", 0)
    parser.add_argument("--device", type=usable_device, help="default: cuda where there is one, else cpu")
    add("--threads", number(int, 1, 1024), "of operations on the CPU; for several runs side by side")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast; weights, loss, optimizer stay float32")
    parser.add_argument("--deterministic", action="store_true", help="the same bits again on a GPU too; slower there")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument(
        "--output", type=file_path, default="results", help="parent of the run's folder (default: results)"
    )
    parser.add_argument("--name", type=folder_name, help="the run's folder (default: DATASET-NETWORK-METHOD-sSEED)")
    parser.add_argument("--resume", action="store_true", help="go on after the last checkpoint, or start")
    add("--save_minutes", number(float, above=0), "between checkpoints, beside the one after every epoch", 10.0)
    parser.add_argument(
        "--init", type=file_path, metavar="FILE", help="start from the weights of a checkpoint or a state dict"
    )
    parser.add_argument(
        "--evaluate", type=file_path, metavar="FILE", help="only evaluate a checkpoint or a state dict (best.pt)"
    )


def launch() -> tuple[int, int]:
    """As utils.processes.launched; what is wrong with it, the user can mend."""
    try:
        return launched()
    except ValueError as error:
        raise UsageError(str(error)) from None


def run_settings(args: argparse.Namespace, parser: Parser) -> tuple[dict[str, object], dict[str, object]]:
    """Fills in the defaults that depend on other flags (`dataset` and `depth` are there already). Returns what
    config.json holds, every flag that says what the run is, and where; and the defaults of these flags."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    local_rank, _ = launch()
    if args.device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UsageError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here")
    network = f"resnet{args.depth}" if args.depth else "cnn"
    try:  # also of a folder of images whose name was not typed, as in --data .
        args.name = in_utf8(args.name or f"{args.dataset}-{network}-{args.method}-s{args.seed}")
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"argument --name: {error}") from None
    unread = {"dist_prob", "constant_prob", "block_size", "alpha", "inside"} - set(METHODS[args.method].settings)
    for flag in unread:
        setattr(args, flag, type(getattr(args, flag))(0))
    if args.compile and not METHODS[args.method].compiles:
        raise UsageError(f"argument --compile: {args.method} would be compiled anew in every step, as its rate grows")
    settings = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "evaluate")}
    defaults = {flag: settings[flag] if flag in unread else parser.get_default(flag) for flag in settings}
    return settings | {"device": str(args.device)}, defaults


def check_folder(args: argparse.Namespace, settings: dict[str, object], defaults: dict[str, object]) -> Path:
    """The run's folder. Raises UsageError where the flags do not fit it."""
    folder = Path(args.output, args.name)
    if args.evaluate and args.init:
        raise UsageError("--evaluate and --init: the one trains nothing, the other starts a training: leave one out")
    for flag, path in (("--evaluate", args.evaluate), ("--init", args.init)):
        if path and not Path(path).is_file() and not (flag == "--init" and has_checkpoint(folder)):
            hint = ": name its best.pt" if Path(path).is_dir() else ""
            raise UsageError(f"argument {flag}: {path} is no file{hint}")
    if args.evaluate:
        return folder
    if not args.resume and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise UsageError(f"{folder} holds a run already: add --resume to go on with it, or give another --name")
    if changed := changed_settings(started_with(folder, settings), settings, defaults):
        why = ""
        if any(change.startswith("epochs: ") for change in changed):
            why = "; the schedules of learning rate and dist_prob belong to the number of epochs"
        init = (
            f", with --init {folder}/checkpoint.pt to start from this run's weights" if has_checkpoint(folder) else ""
        )
        raise UsageError(
            f"{folder} was started with other settings ({', '.join(changed)}){why}: give another --name{init}"
        )
    return folder


def started_with(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """The settings in the folder's config.json; `settings` where there is none."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not the settings")
        return found
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, and --resume writes it again") from None
