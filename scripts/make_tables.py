"""Writes README.md into a folder of published runs (default results/published), and a picture of each study in it.

usage: python scripts/make_tables.py [FOLDER]

Every figure comes from config.json and metrics.csv of FOLDER/STUDY/NAME or FOLDER/NAME. A complete run of a published
setting enters the paper's table; any other stands in its study's table, with what sets it apart. The seeds of a setting
are one row: mean and deviation, and the paired difference to the same seeds without regularizer, with a 95 % interval.
The figures of benchmark.py in FOLDER/benchmark/*.json are a table of their own.
"""

import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import train_imagenet  # noqa: E402
from utils.files import replacing  # noqa: E402
from utils.record import PLACES  # noqa: E402

SAME = {"seed", "processes", "amp", "compile", *PLACES}  # what may differ between runs of one setting
CONDITIONS = ("runs", "epochs", "minutes a run", "precision", "device")
METHOD = {"method", "dist_prob", "alpha", "block_size", "inside", "label_smoothing", "augment"}

# Table -> (script that runs its rows, columns of metrics.csv, row -> (label, the paper's figures)). The paper's Table 3
# takes all but none and Disout from the DropBlock paper, where a run is 270 epochs.
PAPER = {
    "Table 2, CIFAR-10 (ResNet-56)": (
        "table2_cifar10.sh",
        {"test_top1": "accuracy"},
        {
            "none": ("no regularizer", ["93.95 ± 0.09"]),
            "dropblock": ("DropBlock", ["94.18 ± 0.14"]),
            "disout": ("Block Feature Map Distortion", ["94.50 ± 0.15"]),
        },
    ),
    "Table 2, CIFAR-100 (ResNet-56)": (
        "table2_cifar100.sh",
        {"test_top1": "accuracy"},
        {
            "none": ("no regularizer", ["71.81 ± 0.21"]),
            "dropblock": ("DropBlock", ["73.08 ± 0.23"]),
            "disout": ("Block Feature Map Distortion", ["73.71 ± 0.20"]),
        },
    ),
    "Table 3, ImageNet (ResNet-50)": (
        "table3_imagenet.sh",
        {"test_top1": "top-1", "test_top5": "top-5"},
        {
            "none": ("no regularizer", ["76.51 ± 0.07", "93.20 ± 0.05"]),
            "dropout": ("Dropout", ["76.80 ± 0.04", "93.41 ± 0.04"]),
            "drop_path": ("DropPath", ["77.10 ± 0.08", "93.50 ± 0.05"]),
            "spatial_dropout": ("SpatialDropout", ["77.41 ± 0.04", "93.74 ± 0.02"]),
            "cutout": ("Cutout", ["76.52 ± 0.07", "93.21 ± 0.04"]),
            "autoaugment": ("AutoAugment", ["77.63", "93.82"]),
            "label_smoothing": ("Label Smoothing", ["77.17 ± 0.05", "93.45 ± 0.03"]),
            "dropblock": ("DropBlock", ["78.13 ± 0.05", "94.02 ± 0.02"]),
            "disout_elementwise": ("Feature Map Distortion", ["77.71 ± 0.05", "93.89 ± 0.04"]),
            "disout": ("Block Feature Map Distortion", ["78.76 ± 0.05", "94.33 ± 0.03"]),
        },
    ),
}


class Run(NamedTuple):
    study: str
    config: dict[str, object]
    rows: list[dict[str, float]]  # metrics.csv, an epoch each

    def last(self, column: str) -> float:
        return self.rows[-1][column]

    def best(self, column: str) -> float:
        """Of the epoch with the best top-1, as the paper reports it."""
        return max(self.rows, key=lambda row: row["test_top1"])[column]


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results/published")
    runs = read_runs(folder)
    if not runs:
        sys.exit(f"make_tables.py: no complete run in {folder}/STUDY/NAME or {folder}/NAME")
    published = {title: published_settings(script) for title, (script, _, _) in PAPER.items()}
    on_recipe = [settings for rows in published.values() for _, settings in rows.values()]

    sections = [
        "# Published runs",
        "Written by `python scripts/make_tables.py` from the logs beside it. Accuracies in %: *last* is that of the "
        "last epoch, *best* that of the best epoch on the images evaluated, as the paper reports it. ± is the "
        "standard deviation over seeds. The difference to no regularizer is of the best epochs, paired by seed, with a "
        "95 % interval (Student's t) where there are two seeds or more.",
    ]
    for study in sorted({run.study for run in runs}):
        members = [run for run in runs if run.study == study]
        sections.append(f"## {'Runs without a study' if study == '.' else study}")
        off_recipe = [run for run in members if all(differing(run, settings) for settings in on_recipe)]
        if off_recipe:
            sections.append(study_table(off_recipe))
        if any(len(run.rows) > 1 for run in members):
            draw_study(folder / study / "accuracy.png", study, members)
            sections.append(f"![accuracy over epochs]({study}/accuracy.png)")
    for title, rows in published.items():
        sections.append(paper_table(title, rows, runs))
    if benchmarks := [json.loads(path.read_text()) for path in sorted(folder.glob("benchmark/*.json"))]:
        sections.append(benchmark_table(benchmarks))
    with replacing(folder / "README.md") as partial:
        partial.write_text("\n\n".join(sections) + "\n")


def read_runs(folder: Path) -> list[Run]:
    """The complete runs in FOLDER/STUDY/NAME, and in FOLDER/NAME, whose study is '.'."""
    runs = []
    for summary in sorted([*folder.glob("*/summary.json"), *folder.glob("*/*/summary.json")]):
        with (summary.parent / "metrics.csv").open() as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        runs.append(
            Run(
                str(summary.parent.parent.relative_to(folder)),
                json.loads((summary.parent / "config.json").read_text()),
                rows,
            )
        )
    return runs


def settings_of(command: list[str]) -> dict[str, object]:
    """The settings that a command 'python SCRIPT FLAGS...' asks for, but for those that may differ."""
    script = {"train.py": train, "train_imagenet.py": train_imagenet}[command[1]]
    return {name: value for name, value in script.parse_arguments(command[2:])[1].items() if name not in SAME}


def published_settings(script: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Row -> command and settings, of the commands that a table's script runs."""
    environment = os.environ | {"DRY_RUN": "1", "SEEDS": "0", "LAUNCH": "python"}
    printed = subprocess.run(
        ["bash", ROOT / "scripts" / script], env=environment, capture_output=True, text=True, check=True
    )
    rows = {}
    for line in printed.stdout.splitlines():
        command, rest = line.split(" --seed 0 ")
        row = rest.split("--name ")[1].split("-s0")[0]
        rows[row] = command, settings_of(shlex.split(command))
    return rows


def settings_in(run: Run) -> dict[str, object]:
    """The settings that a run had. A flag that is younger than the run had its default."""
    defaults = settings_of(shlex.split(run.config["command"])[:2])
    return {name: run.config.get(name, value) for name, value in defaults.items()}


def differing(run: Run, settings: dict[str, object]) -> dict[str, object]:
    """The run's settings that are not these."""
    return {name: value for name, value in settings_in(run).items() if settings.get(name) != value}


def label(run: Run) -> str:
    """The method and what it reads."""
    of, parts = settings_in(run), [run.config["method"]]
    parts += [f"p {of['dist_prob']:g}"] if of["dist_prob"] else []
    parts += [f"block {of['block_size']}{' inside' if of['inside'] else ''}"] if of["block_size"] else []
    parts += [f"alpha {of['alpha']:g}"] if of["alpha"] else []
    parts += [f"augment {of['augment']}"] if of["augment"] != "standard" else []
    parts += [f"label smoothing {of['label_smoothing']:g}"] if of["label_smoothing"] else []
    parts += ["bfloat16"] if in_bfloat16(run) else []
    return ", ".join(parts)


def in_bfloat16(run: Run) -> bool:
    return bool(run.config.get("amp"))


def grouped(runs: list[Run]) -> list[list[Run]]:
    """The runs of each setting and precision, by seed; those without regularizer first."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.config["method"] != "none", label(run), run.config["seed"])):
        found.setdefault(label(run) + json.dumps(settings_in(run), sort_keys=True), []).append(run)
    return list(found.values())


def paper_table(title: str, published: dict[str, tuple[str, dict[str, object]]], runs: list[Run]) -> str:
    """The paper's figures and ours; `published` has the command and the settings of each row."""
    script, columns, rows = PAPER[title]
    intro = f"## {title}\n\n`bash scripts/{script}` runs every row with every seed.\n\n"
    members = {row: [run for run in runs if not differing(run, published[row][1])] for row in rows}
    if not any(members.values()):
        return f"{intro}{not_run(columns, rows, published)}"
    figures = [f"{name}, {whose}" for name in columns.values() for whose in ("paper", "ours, best", "ours, last")]
    lines = [["", *figures, "difference to none", *CONDITIONS, "command"]]
    for row, (name, of_paper) in rows.items():
        cells = [name]
        for column, figure in zip(columns, of_paper, strict=True):
            cells += [figure, spread(members[row], Run.best, column), spread(members[row], Run.last, column)]
        command = f"`{published[row][0]}`"
        lines.append([*cells, difference(members[row], members["none"]), *conditions(members[row]), command])
    return f"{intro}{markdown(lines)}"


def not_run(columns: dict[str, str], rows: dict[str, tuple], published: dict[str, tuple]) -> str:
    """The paper's figures alone."""
    lines = [["", *(f"{name}, paper" for name in columns.values()), "ours", "command"]]
    lines += [[name, *of_paper, "not run", f"`{published[row][0]}`"] for row, (name, of_paper) in rows.items()]
    return markdown(lines)


def study_table(runs: list[Run]) -> str:
    """Runs off the published recipe, a row each setting, with what sets it apart from the recipe."""
    lines = [["", "differs from the recipe in", "best", "last", "difference to none", *CONDITIONS, "command"]]
    for group in grouped(runs):
        apart = apart_from_recipe(group[0])
        partners = [run for run in runs if run.config["method"] == "none" and apart_from_recipe(run) == apart]
        partners = [run for run in partners if in_bfloat16(run) == in_bfloat16(group[0])]
        cells = [label(group[0]), ", ".join(f"{name} {value}" for name, value in apart.items())]
        cells += [spread(group, Run.best, "test_top1"), spread(group, Run.last, "test_top1")]
        lines.append([*cells, difference(group, partners), *conditions(group), f"`{group[0].config['command']}`"])
    return markdown(lines)


def apart_from_recipe(run: Run) -> dict[str, object]:
    """The run's settings that are not the recipe's, but for the method's."""
    recipe = settings_of(shlex.split(run.config["command"])[:2])
    return {name: value for name, value in differing(run, recipe).items() if name not in METHOD}


def conditions(runs: list[Run]) -> list[str]:
    """The cells under CONDITIONS."""
    if not runs:
        return ["0", "", "", "", ""]
    minutes = statistics.mean(sum(row["seconds"] for row in run.rows) for run in runs) / 60
    precisions = {run.config.get("precision", "float32") for run in runs}
    devices = {device_of(run.config) for run in runs}
    return [
        str(len(runs)),
        str(len(runs[0].rows)),
        f"{minutes:.1f}",
        *(", ".join(sorted(s)) for s in (precisions, devices)),
    ]


def device_of(config: dict[str, object]) -> str:
    count = config.get("processes", 1)
    name = f"{count} x {config['device_name']}" if count > 1 else config["device_name"]
    return f"{name}, threads: {config['threads']}" if config["device"] == "cpu" else name


def spread(runs: list[Run], measure: Callable[[Run, str], float], column: str) -> str:
    """Mean and standard deviation over the runs."""
    if not runs:
        return "not run"
    values = [measure(run, column) for run in runs]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def difference(runs: list[Run], partners: list[Run]) -> str:
    """Mean of the paired differences in best top-1 to the partner of the same seed, with its 95 % interval."""
    by_seed = {run.config["seed"]: run.best("test_top1") for run in partners}
    differences = [run.best("test_top1") - by_seed[run.config["seed"]] for run in runs if run.config["seed"] in by_seed]
    if not differences or any(run is partners[0] for run in runs):
        return ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f} (one seed)"
    half = student.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def benchmark_table(benchmarks: list[dict]) -> str:
    """The figures of runs of benchmark.py on one machine, each run's median."""
    lines = [["", "target", "measured, a run each"]]
    for rows in zip(*(benchmark["rows"] for benchmark in benchmarks), strict=True):
        bounds = [f"{sign} {rows[0][key]:g}" for sign, key in (("≤", "at_most"), ("≥", "at_least")) if rows[0][key]]
        lines.append([rows[0]["what"], *(bounds or [""]), ", ".join(f"{row['median']:.3g}" for row in rows)])
    machines = ", ".join(sorted({benchmark["machine"] for benchmark in benchmarks}))
    return f"## Benchmark\n\n`python scripts/benchmark.py`, {len(benchmarks)} runs: {machines}.\n\n{markdown(lines)}"


def markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def draw_study(path: Path, title: str, runs: list[Run]) -> None:
    """Top-1 over epochs, a line a setting (the mean over seeds) and a band from the lowest to the highest seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for group in grouped(runs):
        curves = [[row["test_top1"] for row in run.rows] for run in group]
        epochs = range(1, len(curves[0]) + 1)
        name = f"{label(group[0])} ({len(group)} {'run' if len(group) == 1 else 'runs'})"
        [line] = axes.plot(epochs, [statistics.mean(values) for values in zip(*curves, strict=True)], ".-", label=name)
        lowest, highest = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="epoch", ylabel="accuracy, %", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


if __name__ == "__main__":
    main()
