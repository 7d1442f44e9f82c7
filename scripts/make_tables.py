"""Writes the tables of a folder of runs, and a picture of each study in it: README.md into results/published, or
tables.md into another FOLDER.

usage: python scripts/make_tables.py [FOLDER]

Every figure comes from config.json and metrics.csv of FOLDER/STUDY/NAME or FOLDER/NAME. A complete run of a published
setting enters the paper's table; any other stands in its study's table. The seeds of a setting are one row: mean and
deviation, and the paired differences to the same seeds of the baselines, with a 95 % interval. The figures of
benchmark.py in FOLDER/benchmark/*.json are a table of their own.
"""

import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from runs import (
    ROOT,
    Run,
    difference,
    differing,
    grouped,
    in_common,
    label,
    off_recipe,
    one_a_seed,
    precision,
    published_settings,
    read_runs,
    references,
    spread,
)

from utils.files import replacing

MOST_CURVES = 10  # that a picture can show
FEW = 4  # settings; of more, a picture shows those with the most seeds
CONDITIONS = ("runs", "epochs", "minutes a run", "precision", "device")


class PaperTable(NamedTuple):
    script: str  # that runs its rows
    columns: dict[str, str]  # of paper.csv, in metrics.csv with test_ before, and what they are called
    against: tuple[str, ...] = ("none", "dropblock", "disout_elementwise")  # what the rows below them are compared to
    note: str = ""

    def rows(self) -> dict[str, tuple[str, list[str]]]:
        """Row -> label and the paper's figures."""
        with (ROOT / "scripts/paper.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["script"] == self.script]
        return {row["row"]: (row["label"], [row[column] for column in self.columns]) for row in rows}


ON_TABLE_1 = (
    "The authors' code has neither the network nor the settings of this table: all but the network's layers is our "
    "choice. We could not read the table itself; "
    "the paper's figures are a third party's transcription, without the deviations. A third party's rerun "
    "(jiahy0825/Disout) is one run each, best epoch, with augmentation and a constant rate; its `dist_prob` is the "
    "share that is kept, 0.6, and its noise 1/12.8 of ours at the same alpha. The strongest other method of the paper "
    "is RDdrop, with {} %; no row here runs it."
)

# The figures, row by row with where each is from, are in paper.csv.
PAPER = {
    "Table 1, CIFAR-10 (plain CNN, fully connected layers)": PaperTable(
        "table1_cifar10", {"top1": "accuracy"}, ("none", "dropout", "disout-alpha0"), ON_TABLE_1.format("83.11")
    ),
    "Table 1, CIFAR-100 (plain CNN, fully connected layers)": PaperTable(
        "table1_cifar100", {"top1": "accuracy"}, ("none", "dropout", "disout-alpha0"), ON_TABLE_1.format("54.65")
    ),
    "Table 2, CIFAR-10 (ResNet-56)": PaperTable("table2_cifar10", {"top1": "accuracy"}),
    "Table 2, CIFAR-100 (ResNet-56)": PaperTable("table2_cifar100", {"top1": "accuracy"}),
    "Table 3, ImageNet (ResNet-50)": PaperTable("table3_imagenet", {"top1": "top-1", "top5": "top-5"}),
}


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results/published")
    page = folder / ("tables.md" if len(sys.argv) > 1 else "README.md")
    runs = read_runs(folder)
    if not runs:
        sys.exit(f"make_tables.py: no complete run in {folder}/STUDY/NAME or {folder}/NAME")
    published = {title: published_settings(f"{table.script}.sh") for title, table in PAPER.items()}
    on_recipe = [settings for rows in published.values() for _, settings in rows.values()]

    sections = [
        "# Published runs",
        "Written by `python scripts/make_tables.py` from the logs beside it. Accuracies in %: *last* is that of the "
        "last epoch, *best* that of the best epoch on the images evaluated, as the paper reports it, which flatters. "
        "± is the standard deviation over seeds. Differences are paired by seed, with a 95 % interval (Student's t) "
        "where there are two seeds or more. *Higher* and *lower* are said where the interval leaves 0 out. Intervals "
        "are not widened for their number: where there is no difference, one of twenty leaves 0 out. Of a setting and "
        "seed that was run twice, the first by name counts. Minutes are the median of the runs; some had other work "
        "beside them.",
    ]
    for study in sorted({run.study for run in runs}):
        members = [run for run in runs if run.study == study]
        sections.append(f"## {'Runs without a study' if study == '.' else study}")
        scripts = [ROOT / folder / f"{study}.sh" for folder in ("scripts", "scripts/studies")]
        has_script = any(script.exists() for script in scripts)
        sections += [f"Run by `bash {script.relative_to(ROOT)}`." for script in scripts if script.exists()]
        others = [run for run in members if all(differing(run, settings) for settings in on_recipe)]
        if others:
            sections += study_tables(grouped(others), has_script)
        shown = to_draw(grouped(members))
        if any(len(run.rows) > 1 for run in members) and len(shown) <= MOST_CURVES:
            draw_study(folder / study / "accuracy.png", study, shown)
            sections.append(f"![accuracy over epochs]({study}/accuracy.png)")
        if (folder / study / "complexity.csv").exists():
            picture = f"![accuracy, gap and complexity over rate and alpha]({study}/complexity.png)"
            sections += [
                f"`python scripts/studies/complexity.py` measured [complexity.csv]({study}/complexity.csv):",
                picture,
            ]
    for title, rows in published.items():
        sections += paper_table(title, rows, runs)
    benchmarks: dict[tuple, list[dict]] = {}
    for path in sorted(folder.glob("benchmark/*.json")):
        benchmark = json.loads(path.read_text()) | {"name": path.stem}
        measured = tuple(row["what"] for row in benchmark["rows"])
        benchmarks.setdefault((benchmark["machine"], measured), []).append(benchmark)
    if benchmarks:
        sections += ["## Benchmark", "A run's targets are those of its time."]
        sections += map(benchmark_table, benchmarks.values())
    with replacing(page) as partial:
        partial.write_text("\n\n".join(sections) + "\n")


def paper_table(title: str, published: dict[str, tuple[str, dict[str, object]]], runs: list[Run]) -> list[str]:
    """The paper's figures and ours, and our paired differences; `published` has each row's command and settings. A
    line's command is that of its first run, as precision and place may differ from the script's."""
    script, columns, against, note = PAPER[title]
    rows = PAPER[title].rows()
    intro = f"## {title}\n\n{note}{' ' if note else ''}`bash scripts/{script}.sh` runs every row with every seed."
    members = {row: [run for run in runs if not differing(run, published[row][1])] for row in rows}
    if not any(members.values()):
        return [intro, not_run(columns, rows, published)]
    figures = [f"{name}, {whose}" for name in columns.values() for whose in ("paper", "ours, best", "ours, last")]
    lines, pairs = [["", *figures, *CONDITIONS, "command"]], []
    for row, (name, of_paper) in rows.items():
        for kind in sorted({kind_of(run) for run in members[row]}) or [""]:  # a line each
            there = {one: one_a_seed([run for run in runs if kind_of(run) == kind]) for one, runs in members.items()}
            cells = [name]
            for column, figure in zip(columns, of_paper, strict=True):
                cells += [figure, *(spread(there[row], measure, f"test_{column}") for measure in (Run.best, Run.last))]
            command = there[row][0].config["command"] if there[row] else published[row][0]
            command = re.sub(r" --resume\b| --(seed|output|name) ('[^']*'|\S+)", "", command)
            lines.append([*cells, *conditions(there[row]), f"`{command}`"])
            names = {one: f"{text.split(' (')[0]}, {kind}" for one, (text, _) in rows.items()}
            above = [other for other in list(rows)[: list(rows).index(row)] if other in against]
            pairs += [(names[row], there[row], names[other], there[other]) for other in above]
    return [intro, markdown(lines), *paired_differences(pairs, fewest=1)]


def not_run(columns: dict[str, str], rows: dict[str, tuple], published: dict[str, tuple]) -> str:
    """The paper's figures alone."""
    lines = [["", *(f"{name}, paper" for name in columns.values()), "ours", "command"]]
    lines += [[name, *of_paper, "not run", f"`{published[row][0]}`"] for row, (name, of_paper) in rows.items()]
    return markdown(lines)


def study_tables(groups: list[list[Run]], has_script: bool) -> list[str]:
    """Runs off the published recipe: a sentence with what all settings share, a table with a row each, and their
    paired differences. The commands are left out where a script of the study's name has them."""
    in_all = in_common(groups)
    lines = [["", "best", "last", "off the recipe in", *CONDITIONS, "command"]]
    for group, apart in zip(groups, off_recipe(groups), strict=True):
        figures = [spread(group, measure, "test_top1") for measure in (Run.best, Run.last)]
        cells = [label(group[0], in_all), *figures, ", ".join(apart)]
        lines.append([*cells, *conditions(group), f"`{group[0].config['command']}`"])
    shared, columns = sorted(in_all - {precision(groups[0][0])}), list(zip(*lines, strict=True))
    for column in columns[3:]:
        name, *cells = column
        if name == "command" and has_script:
            columns.remove(column)
        elif len(cells) > 1 and len(set(cells)) == 1 and name != "runs":
            columns.remove(column)
            shared.append(f"{name} {cells[0]}")
    sections = [f"All rows: {'; '.join(shared)}."] if shared else []
    sections.append(markdown(list(zip(*columns, strict=True))))
    pairs = [
        (label(group[0], in_all), group, label(other[0], in_all), other)
        for group in groups
        for other in references(group, groups)
    ]
    return sections + paired_differences(pairs, fewest=2)


def paired_differences(pairs: list[tuple[str, list[Run], str, list[Run]]], fewest: int) -> list[str]:
    """A table of the differences of (name, runs, name of the others, the others) with so many seeds in common."""
    lines = [["", "against", "last epoch", "best epoch", "pairs", "in words"]]
    for name, group, other_name, other in pairs:
        last, best = (difference(group, other, measure) for measure in (Run.last, Run.best))
        if last and last.pairs >= fewest:
            words = last.in_words()
            words += "" if words == best.in_words() else f"; best epoch: {best.in_words()}"
            lines.append([name, other_name, str(last), str(best), str(last.pairs), words])
    return ["Paired differences:", markdown(lines)] if len(lines) > 1 else []


def conditions(runs: list[Run]) -> list[str]:
    """The cells under CONDITIONS."""
    if not runs:
        return ["0", "", "", "", ""]
    minutes = statistics.median(sum(row["seconds"] for row in run.rows) for run in runs) / 60
    precisions = {run.config.get("precision", "float32") for run in runs}
    devices = {device_of(run.config) for run in runs}
    return [
        str(len(runs)),
        str(len(runs[0].rows)),
        f"{minutes:.1f}",
        *(", ".join(sorted(s)) for s in (precisions, devices)),
    ]


def kind_of(run: Run) -> str:
    """cpu or cuda, where a run began, and its precision."""
    return ", ".join([str(run.config["device"]).split(":")[0], precision(run) or "float32"])


def device_of(config: dict[str, object]) -> str:
    count = config.get("processes", 1)
    name = f"{count} x {config['device_name']}" if count > 1 else config["device_name"]
    return f"{name}, threads: {config['threads']}" if config["device"] == "cpu" else name


def benchmark_table(benchmarks: list[dict]) -> str:
    """Each run's medians, of runs of benchmark.py that measured the same on one machine; in bold where they miss."""

    def measured(row: dict) -> str:
        missed = row["median"] > (row["at_most"] or math.inf) or row["median"] < (row["at_least"] or 0)
        return f"**{row['median']:.3g}**" if missed else f"{row['median']:.3g}"

    lines = [["", "target", "measured, a run each (bold: target missed)"]]
    for rows in zip(*(benchmark["rows"] for benchmark in benchmarks), strict=True):
        bounds = [f"{sign} {rows[0][key]:g}" for sign, key in (("≤", "at_most"), ("≥", "at_least")) if rows[0][key]]
        lines.append([rows[0]["what"], *(bounds or [""]), ", ".join(map(measured, rows))])
    runs = f"{len(benchmarks)} {'run' if len(benchmarks) == 1 else 'runs'}"
    names = ", ".join(benchmark["name"] for benchmark in benchmarks)
    return f"`python scripts/benchmark.py`, {runs} ({names}): {benchmarks[0]['machine']}.\n\n{markdown(lines)}"


def markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def to_draw(groups: list[list[Run]]) -> list[list[Run]]:
    """The groups; of more than a few, those with the most seeds."""
    most = max(len(group) for group in groups)
    return groups if len(groups) <= FEW else [group for group in groups if len(group) == most]


def draw_study(path: Path, title: str, groups: list[list[Run]]) -> None:
    """Top-1 of the images evaluated over epochs, and how far that of training lies above it: a line a setting (the mean
    over seeds) and a band from the lowest to the highest seed. The first third of training may lie below the axes."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    accuracy, gap = figure.subplots(1, 2)
    settings = off_recipe(groups)
    for group, apart in zip(groups, settings, strict=True):
        epochs = range(1, len(group[0].rows) + 1)
        tested = [[row["test_top1"] for row in run.rows] for run in group]
        gaps = [[row["train_top1"] - row["test_top1"] for row in run.rows] for run in group]
        own = [part for part in apart if any(part not in other for other in settings)]
        count = f"({len(group)} {'run' if len(group) == 1 else 'runs'})"
        name = f"{', '.join([label(group[0], in_common(groups)), *own])} {count}"
        for axes, curves in ((accuracy, tested), (gap, gaps)):
            mean, lowest, highest = (
                [pick(values) for values in zip(*curves, strict=True)] for pick in (statistics.mean, min, max)
            )
            [line] = axes.plot(epochs, mean, ".-", label=name)
            axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.2)
    later = [row["test_top1"] for group in groups for run in group for row in run.rows[len(run.rows) // 3 :]]
    accuracy.set(ylabel="accuracy on the images evaluated, %", ylim=(min(later) - 2, max(later) + 2))
    gap.set(ylabel="accuracy while training (distorted), minus that on the left, %")
    for axes in (accuracy, gap):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    lines = accuracy.get_legend_handles_labels()
    legend = figure.legend(*lines, loc="outside lower center", ncols=2, fontsize="small")
    title = figure.suptitle(f"{title}: mean over seeds, and from the lowest to the highest")
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


if __name__ == "__main__":
    main()
