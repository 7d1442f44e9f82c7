"""A run's checkpoint: everything that the next epoch depends on, in one file."""

from pathlib import Path

import torch
from torch import nn

from utils.files import replacing


class CheckpointError(Exception):
    """A file that is no checkpoint, or that of another network."""


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rows: list) -> None:
    """`step` counts the finished optimizer steps: learning rate, dist_prob and all seeds follow from it. `rows` are
    the rows of metrics.csv so far, one an epoch."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rows": rows}
    with replacing(path) as partial:
        torch.save(state, partial)


def save_weights(path: Path, model: nn.Module) -> None:
    """The plain state dict."""
    with replacing(path) as partial:
        torch.save(model.state_dict(), partial)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict]]:
    """Puts the checkpoint into `model` and `optimizer`; returns its step and rows, 0 and none if there is no file."""
    if not path.exists():
        return 0, []
    state = read(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["rows"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this run ({reason(error)})") from None


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint, or of a plain state dict such as best.pt, into `model`."""
    state = read(path)
    try:
        model.load_state_dict(state.get("model", state))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no weights of this network ({reason(error)})") from None


def read(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever it stumbles over
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason(error)})") from None


def reason(error: Exception) -> str:
    """One line: of a list of mismatches the first."""
    lines = (str(error) or type(error).__name__).splitlines()
    return lines[min(len(lines) - 1, 1)].strip()
