"""What the tables of runs are made of: their cells, and tables of paired differences."""

import re
import statistics

from runs import Run, difference, precision

CONDITIONS = ("runs", "epochs", "minutes a run", "precision", "device")


def markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def anchor(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


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
    precisions = {str(run.config.get("precision", "float32")) for run in runs}
    devices = {device_of(run.config) for run in runs}
    texts = (", ".join(sorted(found)) for found in (precisions, devices))
    return [str(len(runs)), str(len(runs[0].rows)), f"{minutes(runs):.1f}", *texts]


def minutes(runs: list[Run]) -> float:
    """The median of the runs."""
    return statistics.median(sum(row["seconds"] for row in run.rows) for run in runs) / 60


def command_of(run: Run) -> str:
    """Without what is the run's own."""
    return re.sub(r" --resume\b| --(seed|output|name) ('[^']*'|\S+)", "", str(run.config["command"]))


def kind_of(run: Run) -> str:
    """cpu or cuda, where a run began, and its precision."""
    return ", ".join([str(run.config["device"]).split(":")[0], precision(run) or "float32"])


def device_of(config: dict[str, object]) -> str:
    count = config.get("processes", 1)
    name = f"{count} x {config['device_name']}" if isinstance(count, int) and count > 1 else str(config["device_name"])
    return f"{name}, threads: {config['threads']}" if config["device"] == "cpu" else name
