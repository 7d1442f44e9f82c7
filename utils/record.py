"""What a run writes into its folder. All of it but config.json and best.pt follows from the rows, one an epoch, that
the checkpoint holds, so what is missing is written when a run goes on."""

import csv
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint import CheckpointError, Checkpoints, Progress, save_weights
from utils.files import replacing
from utils.printing import say

COLUMNS = (
    *("epoch", "lr", "dist_prob", "distorted", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5"),
    *("seconds", "images_per_second"),
)

# The same tags in every run, so that TensorBoard overlays them.
TAGS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "train_top1": "top1/train",
    "test_top1": "top1/test",
    "test_top5": "top5/test",
    "lr": "schedule/lr",
    "dist_prob": "schedule/dist_prob",
    "distorted": "schedule/distorted",
    "images_per_second": "speed/images_per_second",
}


class Recorder:
    """Writes a run's folder: config.json at each start, the rest after every epoch, a summary when it is complete.

    Args:
        folder: the run's folder, which is made.
        settings: of the run, flat, under the flags' names.
        command: the script and its arguments.
        device: that it trains on.
        evaluated_on: 'test' or 'holdout'.
        checkpoints: of the run.
        progress: up to the checkpoint that it goes on from.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, object],
        command: list[str],
        device: torch.device,
        evaluated_on: str,
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> None:
        self.folder, self.settings, self.device, self.evaluated_on = folder, settings, device, evaluated_on
        self.checkpoints, rows = checkpoints, progress.rows
        if progress.step:
            within = f" and {progress.step} steps in all" if progress.totals is not None else ""
            say(f"{folder}: going on after epoch {len(rows)}{within}")
        if rows and not (folder / "best.pt").exists():
            say(f"{folder}/best.pt is missing: there will be one if a later epoch is better")
        here = surroundings(command, device, settings["amp"]) | {"compile": settings["compile"]}
        config = folder / "config.json"
        write_json(
            config,
            with_places(read_json(config), here) if config.exists() else settings | here,
        )
        write_metrics(folder, rows)
        self.events = start_events(folder, rows)

    def add_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Writes and prints the last row. In this order a kill between two files costs nothing: what follows the
        checkpoint is written again from its rows."""
        rows = progress.rows
        if best_epoch(rows) == len(rows):
            save_weights(self.folder / "best.pt", model)
        self.checkpoints.save(model, optimizer, progress)
        write_metrics(self.folder, rows)
        write_events(self.events, rows[-1])
        say(epoch_line(rows[-1], self.settings["epochs"], self.evaluated_on))

    def finish(self, rows: Sequence[dict[str, float]], model: nn.Module, learned_top1: float | None = None) -> None:
        """summary.json, whose presence means that the run is complete, and curve.png. `learned_top1` is the accuracy of
        the last epoch's weights on the training images, in evaluation, so without distortion and augmentation."""
        self.events.close()
        best = rows[best_epoch(rows) - 1]
        of_run = ("model", "method", "dataset", "depth", "seed", "epochs")
        summary = {name: self.settings[name] for name in of_run if name in self.settings} | {
            "evaluated_on": self.evaluated_on,
            "train_images": rows[-1]["train_images"],
            "test_images": rows[-1]["test_images"],
            "skipped": rows[-1]["skipped"],
            "best_top1": round(best["test_top1"], 4),
            "best_top5": round(best["test_top5"], 4),
            "best_epoch": best["epoch"],
            "last_top1": round(rows[-1]["test_top1"], 4),
            "last_top5": round(rows[-1]["test_top5"], 4),
            **({} if learned_top1 is None else {"learned_top1": round(learned_top1, 4)}),
            "distorted": round(rows[-1]["distorted"], 6),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "device": device_name(self.device),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
        }
        write_json(self.folder / "summary.json", summary)
        say(f"{self.folder}:\n{json.dumps(summary, indent=1)}")
        draw_curve(self.folder, rows, self.evaluated_on)


def say_complete(folder: Path) -> None:
    """Prints the summary of a complete run, and draws its curve.png where that is missing."""
    summary = (folder / "summary.json").read_text(encoding="utf-8")
    say(f"{folder} is complete:\n{summary.rstrip()}")
    if not (folder / "curve.png").exists():
        draw_curve(folder, read_metrics(folder), read_json(folder / "summary.json")["evaluated_on"])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.csv, an epoch each. Raises CheckpointError: it cannot be read."""
    path = folder / "metrics.csv"
    try:
        with path.open(encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("it has no epoch")
        return rows
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """config.json or summary.json. Raises CheckpointError: it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not names and values")
        return found
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def surroundings(command: list[str], device: torch.device, amp: bool) -> dict[str, object]:
    """What a run depends on beside its settings."""
    float32 = "TF32 convolutions" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"
    return {
        "command": shlex.join(["python", *command]),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 autocast" if amp else float32,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "commit": git_commit(),
    }


def with_places(config: dict[str, object], here: dict[str, object]) -> dict[str, object]:
    """The `config` of a run that goes on `here`: where machine, threads, precision, torch, the code or whether it was
    compiled are others, all there were, in order."""
    for name in ("device_name", "threads", "precision", "compile", "torch", "commit"):
        before = config.setdefault(name, here[name])
        if str(here[name]) != str(before).split(", then ")[-1]:
            config[name] = f"{before}, then {here[name]}"
    return config


def write_json(path: Path, content: dict[str, object]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if device.type == "cpu" and cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{device.type} ({platform.machine()})"


def git_commit() -> str | None:
    """The commit of the code that runs, with '-dirty' where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def epoch_row(
    epoch: int, dist_prob: float, scores: dict[str, float], images: int, start: float, trained: float
) -> dict[str, float]:
    """What is kept of an epoch, counted from 0, of this many images, which began at `start` and had trained at
    `trained`."""
    return {
        "epoch": epoch + 1,
        "dist_prob": dist_prob,
        **scores,
        "skipped": scores["train_skipped"] + scores["test_skipped"],
        "seconds": time.perf_counter() - start,
        "images_per_second": images / (trained - start),
    }


def epoch_line(row: dict[str, float], epochs: int, evaluated_on: str) -> str:
    images = "image" if row["skipped"] == 1 else "images"
    skipped = f"  {row['skipped']} {images} could not be read" if row["skipped"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  dist_prob {row['dist_prob']:.4f}  "
        f"distorted {row['distorted']:.4f}  train {row['train_loss']:.4f} {row['train_top1']:.2f} %  "
        f"{evaluated_on} {row['test_loss']:.4f} {row['test_top1']:.2f} %  "
        f"{row['images_per_second']:.0f} images/s{skipped}"
    )


def write_metrics(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    with replacing(folder / "metrics.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: format(row[name], ".6g") for name in COLUMNS} for row in rows)


def start_events(folder: Path, rows: Sequence[dict[str, float]]) -> SummaryWriter:
    """A TensorBoard writer that carries on the folder's event files, which an open TensorBoard reads, and which know
    when each epoch ended. What a kill left out of them is written; what lies beyond the rows counts no more."""
    written = {
        (value.tag, event.step)
        for path in folder.glob("events.out.tfevents.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if event.step <= len(rows)
    }
    writer = SummaryWriter(folder, purge_step=len(rows) + 1 if rows else None)
    for row in rows:
        write_events(writer, row, written)
    return writer


def write_events(writer: SummaryWriter, row: dict[str, float], written: Set[tuple[str, int]] = frozenset()) -> None:
    for name, tag in TAGS.items():
        if (tag, row["epoch"]) not in written:
            writer.add_scalar(tag, row[name], row["epoch"])
    writer.flush()


def best_epoch(rows: Sequence[dict[str, float]]) -> int:
    """The epoch, counted from 1, of the highest accuracy; the first of equals."""
    return 1 + max(range(len(rows)), key=lambda index: rows[index]["test_top1"])


def draw_curve(folder: Path, rows: Sequence[dict[str, float]], evaluated_on: str) -> None:
    """curve.png: accuracy and loss over epochs, training beside evaluation."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind, label in zip(
        figure.subplots(1, 2), ("top1", "loss"), ("accuracy, %", "cross-entropy"), strict=True
    ):
        for part, name in (("train", "train"), ("test", evaluated_on)):
            axes.plot(epochs, [row[f"{part}_{kind}"] for row in rows], ".-", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(folder.name, parse_math=False)
    with replacing(folder / "curve.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
