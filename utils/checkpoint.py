"""A run's checkpoint: everything that the next step depends on, in one file."""

import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.files import replacing
from utils.processes import is_first

# The settings that may differ when a run goes on: where it runs, and how fast. config.json says all that there were.
PLACES = (
    *("device", "threads", "amp", "compile", "workers", "save_minutes"),
    *("data_root", "data", "skip_corrupt", "output", "name"),
)

NAMES = ("checkpoint.pt", "checkpoint_previous.pt")

# Under what scripts put their weights, and what DataParallel and torch.compile put before their names. No module of our
# networks is called so.
WRAPPINGS = ("state_dict", "model", "net", "module", "_orig_mod")


class CheckpointError(Exception):
    """A file that is no checkpoint, or not of this run."""


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
    """checkpoint.pt in a run's folder, and checkpoint_previous.pt, which was written before it."""

    def __init__(self, folder: Path, settings: dict[str, object], defaults: dict[str, object]) -> None:
        self.last, self.previous = (folder / name for name in NAMES)
        self.settings, self.defaults = fixed_settings(settings), defaults
        self.last_is_good = False

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """A kill leaves at least one of the two files, whole. A file that could not be read takes nobody's place."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": self.settings}
        state |= progress._asdict() | {"rows": list(progress.rows)}
        with replacing(self.last, self.previous if self.last_is_good else None) as partial:
            write(partial, state)
        self.last_is_good = True

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts the newest checkpoint that is good into `model` and `optimizer`, and says so where it is the last but
        one. A run that has none begins.

        Raises:
            CheckpointError: there are some, and none is good; says what is wrong with the newest.
        """
        problems = []
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    progress = self._read(path, model, optimizer)
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                self.last_is_good = path == self.last
                if problems and is_first():
                    print(f"{problems[0]}: going on from {path.name}")
                return progress
        if problems:
            raise CheckpointError(f"{problems[0]}: put a good one there, or give another --name to start over")
        return Progress()

    def _read(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        state = read(path)
        try:
            if changed := changed_settings(state["settings"], self.settings, self.defaults):
                raise CheckpointError(f"{path} is of a run with other settings ({', '.join(changed)})")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return Progress(state["step"], tuple(state["rows"]), state["totals"], state["seconds"])
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is no checkpoint of this run ({reason(error)})") from None


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
    return {flag: value for flag, value in settings.items() if flag not in PLACES}


def changed_settings(before: dict[str, object], settings: dict[str, object], defaults: dict[str, object]) -> list[str]:
    """'flag: old -> new' for each fixed setting that differs. A flag that is younger than what was `before` had its
    default."""
    had = defaults | before
    return [
        f"{flag}: {had.get(flag)} -> {value}"
        for flag, value in fixed_settings(settings).items()
        if had.get(flag) != value
    ]
