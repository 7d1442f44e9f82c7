"""The paper's tables, with its figures beside ours: on the published page, and the first that ran in the README."""

import csv
import textwrap
from typing import NamedTuple

from cells import CONDITIONS, command_of, conditions, device_of, kind_of, markdown, minutes, paired_differences
from runs import ROOT, Run, differing, one_a_seed, spread

Published = dict[str, tuple[str, dict[str, object]]]  # row -> command and settings


class PaperTable(NamedTuple):
    script: str  # that runs its rows
    columns: dict[str, str]  # of paper.csv, in metrics.csv with test_ before, and what they are called
    against: tuple[str, ...] = ("none", "dropblock", "disout_elementwise")  # what the rows below them are compared to
    note: str = ""

    def rows(self) -> dict[str, tuple[str, list[str]]]:
        """Row -> label and the paper's figures."""
        with (ROOT / "scripts/paper.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["script"] == self.script]
        return {row["row"]: (row["label"], [row[column] for column in self.columns]) for row in rows}


ON_TABLE_1 = (
    "The authors' code has neither the network nor the settings of this table: all but the network's layers is our "
    "choice. The paper's figures are those that jiahy0825/Disout has transcribed, without the deviations. That code's "
    "own rerun is one run each, best epoch, with augmentation and a constant rate; its `dist_prob` is the share that "
    "is kept, 0.6, and its noise 1/12.8 of ours at the same alpha. The strongest other method of the paper is RDdrop "
    "(Zhai and Wang, ICLR 2018), with {} %; no row here runs it. The code of its first author trains without batch "
    "norm, which this network has: so this table cannot tell whether the paper's gain is there."
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
IN_README = sorted(PAPER, key=lambda title: (not title.startswith("Table 2"), title))[:4]  # the first of these that ran


def paper_table(title: str, published: Published, runs: list[Run]) -> list[str]:
    """The paper's figures and ours, and our paired differences; `published` has each row's command and settings. A
    line's command is that of its first run, as precision and place may differ from the script's."""
    script, columns, against, note = PAPER[title]
    rows = PAPER[title].rows()
    intro = f"{note}{' ' if note else ''}`bash scripts/{script}.sh` runs every row with every seed."
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
            command = command_of(there[row][0]) if there[row] else published[row][0]
            lines.append([*cells, *conditions(there[row]), f"`{command}`"])
            names = {one: f"{text.split(' (')[0]}, {kind}" for one, (text, _) in rows.items()}
            above = [other for other in list(rows)[: list(rows).index(row)] if other in against]
            pairs += [(names[row], there[row], names[other], there[other]) for other in above]
    return [intro, markdown(lines), *paired_differences(pairs)]


def not_run(columns: dict[str, str], rows: dict[str, tuple[str, list[str]]], published: Published) -> str:
    """The paper's figures alone."""
    lines = [["", *(f"{name}, paper" for name in columns.values()), "ours", "command"]]
    lines += [[name, *of_paper, "not run", f"`{published[row][0]}`"] for row, (name, of_paper) in rows.items()]
    return markdown(lines)


def readme_table(published: dict[str, Published], runs: list[Run]) -> str:
    """The first table that has a row run in full, with hardware, hours, logs and command; nothing where none has."""
    for title in IN_README:
        rows, script = PAPER[title].rows(), PAPER[title].script
        members = {row: [run for run in runs if not differing(run, published[title][row][1])] for row in rows}
        if not any(members.values()):
            continue
        lines = [[title, "paper, best epoch", "ours, best epoch", "ours, last epoch", "seeds"]]
        for row, (name, [of_paper, *_]) in rows.items():
            kinds = sorted({kind_of(run) for run in members[row]})
            for kind in kinds or [""]:
                there = one_a_seed([run for run in members[row] if kind_of(run) == kind])
                figures = [spread(there, measure, "test_top1") for measure in (Run.best, Run.last)]
                short = name.split(" (")[0]  # without what the page alone explains
                lines.append([f"{short} ({kind})" if len(kinds) > 1 else short, of_paper, *figures, str(len(there))])
        ran = [(row, run) for row, there in members.items() for run in there]
        devices = "; ".join(sorted({device_of(run.config) for _, run in ran}))
        row, first = ran[0]
        # And the flags that the script was handed.
        flags = [word for word in command_of(first).split() if word not in published[title][row][0].split()]
        command = " ".join([f"bash scripts/{script}.sh", *flags])
        text = f"{minutes([run for _, run in ran]) / 60:.1f} hours a run, {devices}. [Logs]"
        text += f"(results/published/{first.study}) · `{command}`"
        return "\n".join([markdown(lines), "", *textwrap.wrap(text, 120, break_on_hyphens=False)])
    return ""
