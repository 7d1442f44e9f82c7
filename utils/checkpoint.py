"""A run's checkpoint: everything that the next step depends on, in one file."""

import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.files import replacing
from utils.printing import say
from utils.processes import Failure, first_does, from_first, is_first

# The settings that may differ when a run goes on: where it runs, and how fast. config.json says all that there were.
PLACES = (
    *("device", "threads", "amp", "compile", "workers", "save_minutes"),
    *("data_root", "data", "skip_corrupt", "output", "name"),
)

NAMES = ("checkpoint.pt", "checkpoint_previous.pt")

# Under what scripts put their weights, and what DataParallel and torch.compile put before their names. No module of our
# networks is called so.
WRAPPINGS = ("state_dict", "model", "net", "module", "_orig_mod")


class CheckpointError(Failure):
    """A file that is no checkpoint, or not of this run."""


class OtherImages(CheckpointError):
    """The images are not those that the run began with."""


class Progress(NamedTuple):
    """How far a run is: learning rate, dist_prob, order and all seeds follow from it."""

    step: int = 0  # optimizer steps finished
    rows: tuple[dict[str, float], ...] = ()  # of metrics.csv, one a finished epoch
    # Of an epoch that is not finished: train_epoch's sums over its steps, a row a process, and the time it took so far.
    totals: Tensor | None = None
    seconds: float = 0.0


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in NAMES)


class Checkpoints:
    """checkpoint.pt in a run's folder, and checkpoint_previous.pt, which was written before it.

    Args:
        folder: the run's.
        settings: of the run, flat, under the flags' names.
        defaults: of these.
        images: the fingerprint of each part of an image folder, on whose list the order within an epoch depends.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, object],
        defaults: dict[str, object],
        images: dict[str, tuple[int, str]] | None = None,
    ) -> None:
        self.last, self.previous = (folder / name for name in NAMES)
        self.settings, self.defaults, self.images = fixed_settings(settings), defaults, images or {}
        self.last_is_good = False

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """A kill leaves at least one of the two files, whole. A file that could not be read takes nobody's place."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": self.settings}
        state |= {"images": self.images} if self.images else {}
        state |= progress._asdict() | {"rows": list(progress.rows)}
        with replacing(self.last, self.previous if self.last_is_good else None) as partial:
            write(partial, state)
        self.last_is_good = True

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts the newest checkpoint that is good into `model` and `optimizer`, and says so where it is the last but
        one. A run that has none begins. Of several processes the first reads it, and hands it to the others.

        Raises:
            CheckpointError: there are some, and none is good; says what is wrong with the newest.
            OtherImages: it is good, but the images have changed since.
        """
        state = from_first(first_does(lambda: self._load_newest(model, optimizer)))
        if state is None:
            return Progress()
        if not is_first():
            put(state, model, optimizer)
        return Progress(state["step"], tuple(state["rows"]), state["totals"], state["seconds"])

    def _load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        problems = []
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    state = self._load(path, model, optimizer)
                except OtherImages:
                    raise
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                self.last_is_good = path == self.last
                if problems:
                    say(f"{problems[0]}: going on from {path.name}")
                return state
        if problems:
            raise CheckpointError(f"{problems[0]}: put a good one there, or give another --name to start over")
        return None

    def _load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = read(path)
        try:
            if changed := changed_settings(state["settings"], self.settings, self.defaults):
                raise CheckpointError(f"{path} is of a run with other settings ({', '.join(changed)})")
            if changed := changed_images(state.get("images", {}), self.images):
                raise OtherImages(
                    f"{path.parent} was started with other images ({', '.join(changed)}): put them back, or give "
                    f"another --name, with --init {path} to start from this run's weights"
                )
            put(state, model, optimizer)
            Progress(state["step"], tuple(state["rows"]), state["totals"], state["seconds"])
            return state
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is no checkpoint of this run ({reason(error)})") from None


def put(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def save_weights(path: Path, model: nn.Module) -> None:
    """The plain state dict."""
    with replacing(path) as partial:
        write(partial, model.state_dict())


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint, or of a plain state dict such as best.pt, into `model`. They may lie under one
    of WRAPPINGS, and have them in their names.

    Raises:
        CheckpointError: the file cannot be read, or is of another network.
    """
    state = read(path)
    try:
        while inner := [state[name] for name in WRAPPINGS if isinstance(state.get(name), dict)]:
            state = inner[0]
        weights = {".".join(part for part in name.split(".") if part not in WRAPPINGS): state[name] for name in state}
        weights.pop("n_averaged", None)  # beside the weights of an AveragedModel
        model.load_state_dict(weights)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no weights of this network ({reason(error)}): has it another depth or other classes?"
        ) from None


def write(path: Path, state: dict[str, object]) -> None:
    """Through memory: torch.save to a full disk raises what no other writing raises."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())


# What others save beside weights, none of which runs code: a run's flags (timm and torchvision), numpy's scalars and
# arrays (its random state has one), whose functions have other names in numpy 1 and 2.
NUMPY = {"scalar": np.float64().__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
HARMLESS = [
    *(Namespace, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"]}),
    *((NUMPY[name], f"numpy.{core}.multiarray.{name}") for name in NUMPY for core in ("core", "_core")),
]


def read(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever it stumbles over
        found = {EOFError: "it is empty", RuntimeError: "it is cut short or damaged"}
        found |= {pickle.UnpicklingError: "it is no torch file, or has code in it", IndexError: "it is no torch file"}
        why = found.get(type(error), type(error).__name__)
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {why}") from None


def reason(error: Exception) -> str:
    """One line, and not all of it: of a list of mismatches the first."""
    lines = (str(error) or type(error).__name__).splitlines()
    line = lines[min(len(lines) - 1, 1)].strip()
    return line if len(line) < 90 else f"{line[:80]} ..."


def fixed_settings(settings: dict[str, object]) -> dict[str, object]:
    """Those that stay. The name of an image folder is a place as the folder is: which images it holds is compared."""
    places = (*PLACES, "dataset") if "data" in settings else PLACES
    return {flag: value for flag, value in settings.items() if flag not in places}


def changed_settings(before: dict[str, object], settings: dict[str, object], defaults: dict[str, object]) -> list[str]:
    """'flag: old -> new' for each fixed setting that differs. A flag that is younger than what was `before` had its
    default."""
    had = defaults | before
    return [
        f"{flag}: {had.get(flag)} -> {value}"
        for flag, value in fixed_settings(settings).items()
        if had.get(flag) != value
    ]


def changed_images(before: dict[str, tuple[int, str]], images: dict[str, tuple[int, str]]) -> list[str]:
    """'train/: 24, now 25' for each part whose list is another. A checkpoint that is older than this has no lists."""
    return [
        f"{part}/: {before[part][0]}, now {images[part][0]}" + " of other names" * (before[part][0] == images[part][0])
        for part in before
        if before[part] != images[part]
    ]
