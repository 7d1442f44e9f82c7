"""The complete runs of a folder, their settings, and what their seeds say together."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
import train_imagenet
from models.resnet_cifar import ResNet
from utils import data
from utils.checkpoint import PLACES, load_weights
from utils.flags import UsageError
from utils.record import read_json, read_metrics

SAME = {"seed", "processes", "accumulate_steps", "deterministic", *PLACES}  # may differ between a setting's runs
TUNED = {"lr", "weight_decay"}  # which each method of a study may have as its own
METHOD = {"method", "dist_prob", "constant_prob", "alpha", "block_size", "inside", "label_smoothing", "augment"}


class Run(NamedTuple):
    study: str
    config: dict[str, object]
    rows: list[dict[str, float]]  # metrics.csv, an epoch each

    def last(self, column: str) -> float:
        return self.rows[-1][column]

    def best(self, column: str) -> float:
        """Of the epoch with the best top-1, as the paper reports it."""
        return max(self.rows, key=lambda row: row["test_top1"])[column]


Measure = Callable[[Run, str], float]  # Run.last or Run.best


class Difference(NamedTuple):
    """Of pairs of runs of the same seed. The 95 % interval and the two-sided p value are of Student's t; None where
    there is one pair."""

    mean: float
    half_width: float | None
    p: float | None
    pairs: int

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} ({self.mean - self.half_width:+.2f} to {self.mean + self.half_width:+.2f})"

    def in_words(self, p: float) -> str:
        """At 5 %, by a p value that may be corrected."""
        verdict = "not significant" if p > 0.05 else "higher" if self.mean > 0 else "lower"
        return f"{verdict}, p {p:.3f}" if p >= 0.001 else f"{verdict}, p < 0.001"


def holm(ps: list[float]) -> list[float]:
    """p values, corrected for their number (Holm, Scandinavian Journal of Statistics, 1979): the smallest of n times n,
    the next times n - 1, ..., and none below one that was smaller."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = corrected[index] = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
    return corrected


def read_runs(folder: Path) -> list[Run]:
    """The complete runs in FOLDER/STUDY/NAME, and in FOLDER/NAME, whose study is '.'. Raises CheckpointError: a log
    cannot be read."""
    runs = []
    for summary in sorted([*folder.glob("*/summary.json"), *folder.glob("*/*/summary.json")]):
        study = str(summary.parent.parent.relative_to(folder))
        runs.append(Run(study, read_json(summary.parent / "config.json"), read_metrics(summary.parent)))
    return runs


def load_trained(run: Path) -> tuple[dict, ResNet, tuple[data.Images, data.Images, Tensor, Tensor]]:
    """config.json, the network after its last epoch, without regularizer, and what it worked on, of a run of train.py
    that has its checkpoint; of a ResNet, as whoever asks looks at its last group."""
    if not (run / "config.json").exists():
        raise UsageError(f"{run} is no run: it has no config.json")
    config = read_json(run / "config.json")
    if config.get("model", "resnet") != "resnet" or config["dataset"] not in data.DATASETS:
        raise UsageError(f"{run} is no run of train.py with a ResNet, which alone has the maps that are looked at here")
    if not (run / "checkpoint.pt").exists():
        raise UsageError(f"{run} has no checkpoint.pt (published runs have none)")
    parts = (config[name] for name in ("dataset", "data_root", "train_size", "holdout"))
    model = ResNet(config["depth"], data.DATASETS[config["dataset"]][0]).to(memory_format=torch.channels_last)
    load_weights(run / "checkpoint.pt", model)
    return config, model, data.load_parts(*parts, torch.device("cpu"))


def settings_of(command: list[str]) -> dict[str, object]:
    """The settings that a command 'python SCRIPT FLAGS...' asks for, but for those that may differ."""
    script = {"train.py": train, "train_imagenet.py": train_imagenet}[command[1]]
    return {name: value for name, value in script.parse_arguments(command[2:])[1].items() if name not in SAME}


def published_settings(script: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Row -> command and settings, of the commands that a table's script runs."""
    environment = os.environ | {"DRY_RUN": "1", "SEEDS": "0", "LAUNCH": "python"}
    printed = subprocess.run(
        ["bash", ROOT / "scripts" / script], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    rows = {}
    for line in printed.stdout.splitlines():
        command, rest = line.split(" --seed 0 ")
        row = rest.split("--name ")[1].split("-s0")[0]
        rows[row] = command, settings_of(shlex.split(command))
    return rows


def recipe(run: Run) -> dict[str, object]:
    """The settings that the run's script has for its network."""
    model = ["--model", run.config["model"]] if "model" in run.config else []
    return settings_of(shlex.split(run.config["command"])[:2] + model)


def settings_in(run: Run) -> dict[str, object]:
    """The settings that a run had. A flag that is younger than the run had its default."""
    return {name: run.config.get(name, value) for name, value in recipe(run).items()}


def differing(run: Run, settings: dict[str, object]) -> dict[str, object]:
    """The run's settings that are not these."""
    return {name: value for name, value in settings_in(run).items() if settings.get(name) != value}


def apart_from_recipe(run: Run) -> dict[str, object]:
    """The run's settings that are not the recipe's, but for the method's; and its network, if it is no ResNet."""
    apart = differing(run, recipe(run) | {"model": "resnet"})
    return {name: value for name, value in apart.items() if name not in METHOD}


def shared_settings(run: Run) -> dict[str, object]:
    """All that runs must share to be compared: their settings but for the method's and what a study tunes."""
    return {name: value for name, value in settings_in(run).items() if name not in METHOD | TUNED}


def off_recipe(groups: list[list[Run]]) -> list[list[str]]:
    """Of each group, the settings that are not the recipe's; one that is not in one group is said of all."""
    names = dict.fromkeys(name for group in groups for name in apart_from_recipe(group[0]))
    of_groups = [settings_in(group[0]) for group in groups]
    return [[f"{name} {settings[name]}" for name in names if name in settings] for settings in of_groups]


def precision(run: Run) -> str:
    """As a label says it: nothing for float32, and all of them where a run went on in another."""
    said = str(run.config.get("precision", "float32"))
    return {"float32": "", "bfloat16 autocast": "bfloat16"}.get(said, said)


def label(run: Run, shared: frozenset[str] = frozenset()) -> str:
    """The method and what it reads, and what else a label says but for these."""
    of, parts = settings_in(run), [run.config["method"]]
    parts += [f"p {of['dist_prob']:g}"] if of["dist_prob"] else []
    parts += ["constant"] if of["constant_prob"] else []
    parts += [f"block {of['block_size']}{' inside' if of['inside'] else ''}"] if of["block_size"] else []
    parts += [f"alpha {of['alpha']:g}"] if run.config["method"] == "disout" else []
    return ", ".join(parts + [part for part in beside_method(run) if part not in shared])


def beside_method(run: Run) -> list[str]:
    """What a label says beside the method."""
    of = settings_in(run)
    found = [f"augment {of['augment']}"] if of["augment"] != "standard" else []
    found += [f"label smoothing {of['label_smoothing']:g}"] if of["label_smoothing"] else []
    return found + ([precision(run)] if precision(run) else [])


def in_common(groups: list[list[Run]]) -> frozenset[str]:
    """What several groups share beside the method, which need not stand in every label."""
    of_groups = [frozenset(beside_method(group[0])) for group in groups]
    return frozenset.intersection(*of_groups) if len(groups) > 1 else frozenset()


def grouped(runs: list[Run]) -> list[list[Run]]:
    """The runs of each setting and precision, by seed; no regularizer first, then DropBlock."""
    order = {"none": 0, "dropblock": 1}
    found: dict[str, list[Run]] = {}

    def place(run: Run) -> tuple:
        of = settings_in(run)
        numbers = (of["dist_prob"] or 0, of["block_size"] or 0, of["alpha"] or 0)
        return order.get(run.config["method"], 2), *numbers, label(run), run.config["seed"]

    for run in sorted(runs, key=place):
        found.setdefault(label(run) + json.dumps(settings_in(run), sort_keys=True), []).append(run)
    return [one_a_seed(group) for group in found.values()]


def one_a_seed(runs: list[Run]) -> list[Run]:
    """The first run of each seed: the same seed once more is no further evidence."""
    return list({run.config["seed"]: run for run in reversed(runs)}.values())[::-1]


def references(group: list[Run], groups: list[list[Run]]) -> list[list[Run]]:
    """The groups that a group is compared to: no regularizer, for Disout also DropBlock, Dropout, and Disout at the
    script's default setting or its alpha, and beside float32 the same in float32. They share all settings but the
    method's, and what a study tunes for each method. None in a grid, which chooses on held-out images."""
    run, found = group[0], []
    if run.config.get("holdout"):
        return []
    for other in groups:
        method = other[0].config["method"]
        if other is group or shared_settings(other[0]) != shared_settings(run):
            continue
        if precision(other[0]) == precision(run):
            baselines = {"none": (), "disout": ("none", "dropblock", "dropout")}.get(run.config["method"], ("none",))
            both_disout = method == run.config["method"] == "disout"
            found += [other] if method in baselines or (both_disout and is_default(other[0], run)) else []
        elif not precision(other[0]) and settings_in(other[0]) == settings_in(run):
            found.append(other)
    return found


def is_default(run: Run, beside: Run) -> bool:
    """Whether Disout has the script's own setting, or its alpha and all else as the run beside it."""
    default, of, wanted = recipe(run), settings_in(run), settings_in(beside)
    places = ("dist_prob", "block_size", "inside")
    return of["alpha"] == default["alpha"] and any(
        all(of[name] == x[name] for name in places) for x in (default, wanted)
    )


def spread(runs: list[Run], measure: Measure, column: str) -> str:
    """Mean and standard deviation over the runs."""
    if not runs:
        return "not run"
    values = [measure(run, column) for run in runs]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def difference(runs: list[Run], partners: list[Run], measure: Measure) -> Difference | None:
    """Of top-1, to the partners of the same seeds; None where there is no pair."""
    by_seed = {run.config["seed"]: measure(run, "test_top1") for run in partners}
    differences = [
        measure(run, "test_top1") - by_seed[run.config["seed"]] for run in runs if run.config["seed"] in by_seed
    ]
    if not differences:
        return None
    mean, pairs = statistics.mean(differences), len(differences)
    if pairs == 1:
        return Difference(mean, None, None, 1)
    error = statistics.stdev(differences) / pairs**0.5
    p = 2 * student.sf(abs(mean) / error, pairs - 1) if error else float(mean == 0)
    return Difference(mean, student.ppf(0.975, pairs - 1) * error, float(p), pairs)
