"""What the tables of runs are made of: their cells, and tables of paired differences."""

import re
import statistics

from runs import Run, difference, holm, precision

CONDITIONS = ("runs", "epochs", "minutes a run", "precision", "device")


def markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def anchor(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


Pair = tuple[str, list[Run], str, list[Run]]  # name, runs, name of the others, the others


def paired_differences(pairs: list[Pair], primary: tuple[str, str] | None = None, verdicts: bool = True) -> list[str]:
    """A table of differences of the last and the best epoch. In words, for the last epoch: the `primary` one (name and
    the others' name), which was named before the first run, as it is; of the others, if `verdicts`, those with all
    seeds that any row has, with Holm's correction over these."""
    all_seeds = max((len(runs) for _, *both in pairs for runs in (both[0], both[2])), default=0)
    found = [(pair, difference(pair[1], pair[3], Run.last), difference(pair[1], pair[3], Run.best)) for pair in pairs]
    found = [each for each in found if each[1]]
    in_family = [
        verdicts and last.pairs == all_seeds > 1 and (name, other) != primary for (name, _, other, _), last, _ in found
    ]
    corrected = iter(holm([last.p for (_, last, _), family in zip(found, in_family, strict=True) if family]))
    lines = [["", "against", "last epoch", "best epoch", "pairs", "in words, last epoch"]]
    for ((name, _, other, _), last, best), family in zip(found, in_family, strict=True):
        words = f"{last.in_words(next(corrected))} of {sum(in_family)}" if family else ""
        if last.pairs == 1:
            words = "one seed"
        elif (name, other) == primary:
            words = f"the primary contrast: {last.in_words(last.p)}"
        lines.append([name, other, str(last), str(best), str(last.pairs), words])
    return ["Paired differences:", markdown(lines)] if len(lines) > 1 else []


def conditions(runs: list[Run]) -> list[str]:
    """The cells under CONDITIONS."""
    if not runs:
        return ["0", "", "", "", ""]
    precisions = {str(run.config.get("precision", "float32")) for run in runs}
    devices = {device_of(run.config) for run in runs}
    texts = (", ".join(sorted(found)) for found in (precisions, devices))
    return [str(len(runs)), str(len(runs[0].rows)), f"{minutes(runs):.1f}", *texts]


def minutes(runs: list[Run]) -> float:
    """The median of the runs."""
    return statistics.median(sum(row["seconds"] for row in run.rows) for run in runs) / 60


def command_of(run: Run) -> str:
    """Without what is the run's own, so that it writes into results/: in results/published/ the run is complete."""
    return re.sub(r" --resume\b| --(seed|output|name) ('[^']*'|\S+)", "", str(run.config["command"]))


def kind_of(run: Run) -> str:
    """cpu or cuda, where a run began, and its precision."""
    return ", ".join([str(run.config["device"]).split(":")[0], precision(run) or "float32"])


def device_of(config: dict[str, object]) -> str:
    count = config.get("processes", 1)
    name = f"{count} x {config['device_name']}" if isinstance(count, int) and count > 1 else str(config["device_name"])
    return f"{name}, threads: {config['threads']}" if config["device"] == "cpu" else name
