"""A picture of a study: make_tables.py draws one for each."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from runs import Run, in_common, label, off_recipe

from utils.files import replacing

# Of Okabe and Ito, told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#999999", "#7F3C8D")
MOST_CURVES = len(COLOURS)


def draw_study(path: Path, title: str, groups: list[list[Run]]) -> None:
    """Over epochs, the top-1 of the images evaluated and how far that of training lies above it: a line a setting (the
    mean over seeds) in a band of a standard error. And what the differences are of: the last epoch's top-1, a dot a
    seed, seeds joined over the settings. The second half of training scales the first panel; an inset has all of it."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    accuracy, gap, last = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    inset = accuracy.inset_axes((0.09, 0.66, 0.26, 0.26))
    settings = off_recipe(groups)
    for index, (group, apart) in enumerate(zip(groups, settings, strict=True)):
        colour, epochs = COLOURS[index], range(1, len(group[0].rows) + 1)
        tested = [[row["test_top1"] for row in run.rows] for run in group]
        gaps = [[row["train_top1"] - row["test_top1"] for row in run.rows] for run in group]
        own = [part for part in apart if any(part not in other for other in settings)]
        count = f"({len(group)} {'run' if len(group) == 1 else 'runs'})"
        name = f"{', '.join([label(group[0], in_common(groups)), *own])} {count}"
        for axes, curves in ((accuracy, tested), (gap, gaps)):
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            error = [standard_error(values) for values in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=colour, label=name)
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        inset.plot(epochs, [statistics.mean(values) for values in zip(*tested, strict=True)], color=colour, alpha=0.4)
        final = [run.last("test_top1") for run in group]
        last.scatter([index] * len(final), final, color=colour, s=14, alpha=0.6)
        last.plot(index, statistics.mean(final), marker="_", markersize=28, markeredgewidth=2.5, color=colour)
    points: dict[object, list[tuple[int, float]]] = {}  # of each seed
    for place, group in enumerate(groups):
        for run in group:
            points.setdefault(run.config["seed"], []).append((place, run.last("test_top1")))
    for of_seed in points.values():
        last.plot(*zip(*of_seed, strict=True), color="0.7", linewidth=0.7, zorder=0)
    later = [row["test_top1"] for group in groups for run in group for row in run.rows[len(run.rows) // 2 :]]
    margin = max(0.5, 0.1 * (max(later) - min(later)))
    accuracy.set(title="over epochs", ylabel="test accuracy (%)", ylim=(min(later) - margin, max(later) + margin))
    gap.set(title="overfitting", ylabel="train - test accuracy (%)")
    last.set(title="last epoch, a dot a seed", ylabel="test accuracy (%)", xlim=(-0.6, len(groups) - 0.4))
    last.set_xticks(range(len(groups)), [group[0].config["method"] for group in groups], fontsize="small", rotation=20)
    inset.set(xticks=[], title="all epochs")
    inset.title.set_fontsize("small")
    inset.tick_params(labelsize="x-small")
    for axes in (accuracy, gap):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (accuracy, gap, last):
        axes.grid(alpha=0.3)
    legend = figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    heading = figure.suptitle(f"{title}: mean over seeds, with its standard error")
    for text in (heading, *legend.get_texts()):
        text.set_parse_math(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=90)


def standard_error(values: tuple[float, ...]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
