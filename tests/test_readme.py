"""The pages written by hand: their examples and commands work, their links lead somewhere, their figures are of the
logs."""

import csv
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest

import train
import train_imagenet
from disout import NO_READER_STRENGTH

ROOT = Path(train.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))

import make_tables
from runs import Run, difference, grouped, holm, published_settings, read_runs, spread

from utils.record import read_json

PAGES = [ROOT / page for page in ("README.md", "results/README.md", "examples/README.md", "tests/README.md")]
README, RESULTS, *_ = (page.read_text() for page in PAGES)
GENERATED = (ROOT / "results/published/README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].split() for line in re.findall(r"python train\.py (?!--help)[^\n`|]*", README)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example):
    exec(example, {})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_have_flags_that_exist(command):
    train.parse_arguments(command[2:])


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(python train\w*\.py[^`]*)`", GENERATED))))
def test_commands_of_the_generated_page_start_a_run_in_results(command):
    _, script, *flags = shlex.split(command)
    args, *_ = {"train.py": train, "train_imagenet.py": train_imagenet}[script].parse_arguments(flags)
    assert args.output.split("/")[0] == "results" and "published" not in args.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, _, anchor in re.findall(r"\]\(([^)#:]+)(#([^)]*))?\)", page.read_text()):
        assert (page.parent / path).exists(), path
        headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text().lower(), re.MULTILINE) if anchor else [""]
        assert anchor in [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings], anchor


def prose_of(page):
    """Its lines without tables, code, pictures and comments, in their places."""
    parts = re.split(r"(```.*?```)", page, flags=re.DOTALL)
    text = "".join("\n" * part.count("\n") if part.startswith("```") else part for part in parts)
    return ["" if line.startswith(("|", "!", "<!--")) else line for line in text.splitlines()]


def test_a_screen_tells_what_came_out():
    lines = README.splitlines()
    assert len(lines) <= 200
    figures = [number for number, line in enumerate(lines, 1) if line.startswith("| ") and "±" in line]
    assert len(figures) >= 3 and figures[2] <= 30
    assert len(re.findall(r"\d\.\d", " ".join(prose_of(README)[:40]))) <= 10
    pictures = [number for number, line in enumerate(lines, 1) if line.startswith("![")]
    assert sum(number <= 60 for number in pictures) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page):
    assert not [line for line in prose_of(page.read_text()) if len(line) > 120]


def test_the_results_page_is_short():
    assert len(RESULTS.split()) <= 1300


def test_the_readme_has_the_table_that_make_tables_writes():
    published = {title: published_settings(f"{table.script}.sh") for title, table in make_tables.PAPER.items()}
    table = make_tables.readme_table(published, read_runs(ROOT / "results/published"))
    assert make_tables.with_table(README, table) == README


def test_how_long_a_run_of_table_2_takes_is_the_log_of_one_epoch():
    [run] = [run for run in read_runs(ROOT / "results/published") if run.study == "one_epoch"]
    minutes = run.rows[0]["seconds"] / 60
    assert f"Run for its time, {minutes:.1f} minutes" in RESULTS
    assert f"takes {200 * minutes / 60:.0f} hours on two cores" in README


def test_a_comparison_in_which_nothing_was_fitted_is_called_a_first_look():
    fitted: dict[str, list[float]] = {}
    for run in read_runs(ROOT / "results/published"):
        if run.config["method"] == "none" and not run.config.get("holdout"):
            fitted.setdefault(run.study, []).append(run.last("train_top1"))
    for study, accuracies in fitted.items():
        assert (study in make_tables.FIRST_LOOKS) == (statistics.mean(accuracies) < 95), study


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "results"])
def test_figures_of_accuracy_are_on_the_generated_page(text):
    """Whole: a mean with its deviation, a difference with its interval; and any other number of two decimals. Those of
    runs that were withdrawn are in the history alone."""
    text = re.sub(r"Withdrawn \(\w+\).*?\n\n", "", text, flags=re.DOTALL)
    text = " ".join(text.replace("Python 3.10", "").split())
    signed = r"[+-]\d+\.\d\d"
    whole = re.findall(rf"\d+\.\d\d ± \d+\.\d\d|{signed} \({signed} to {signed}\)", text)
    assert len(whole) > 5
    for figure in whole:
        assert figure in GENERATED, figure
    known = {f"{NO_READER_STRENGTH:.2f}", *re.findall(r"\d+\.\d\d\b", GENERATED), *of_complexity(".2f")}
    known |= {f"{size:.2f}" for size in noise_sizes()}
    for figure in re.findall(r"(?<![\d.])\d+\.\d\d\b", text):
        assert figure in known, figure


def test_figures_of_the_complexity_are_in_its_table():
    section = RESULTS.split("## The complexity term")[1].split("## ")[0]
    for digits in (1, 4):
        known = of_complexity(f".{digits}f")
        found = re.findall(rf"(?<![\d.])\d+\.\d{{{digits}}}(?![\d.])", section)
        assert len(found) > 4
        assert set(found) <= {*known, "0.2", "0.4"}  # rates


def test_sentences_that_no_table_has_are_the_logs():
    runs = read_runs(ROOT / "results/published")
    text = " ".join(RESULTS.split())

    def of_none(study, form):
        rows = [run.rows[-1] for run in runs if run.study == study and run.config["method"] == "none"]
        means = [statistics.mean(row[column] for row in rows) for column in ("train_top1", "test_top1")]
        return [format(mean, form) for mean in means]

    trained, tested = of_none("small_study", ".0f")
    assert f"right on {trained} % of the images that it trains on and on {tested} % of the test set" in text
    trained, tested = of_none("photographs_study", ".1f")
    assert f"right on {trained} % of its training images and {tested} % of the test set" in text
    for study in ("small_study", "photographs_study"):
        hours = sum(row["seconds"] for run in runs if run.study == study for row in run.rows) / 3600
        assert f"{study}.sh`, {'40 runs, ' if study == 'small_study' else ''}{hours:.1f} hours in all" in text


def test_the_table_1_study_is_what_its_logs_say():
    """The table, the hours, the sizes of the noise; and without regularizer the network has fitted in every run."""
    published = ROOT / "results/published/small_table1"
    groups = grouped([run for run in read_runs(published.parent) if run.study == "small_table1"])
    assert [len(group) for group in groups] == [5] * 5
    assert all(run.last("train_top1") >= 99 for run in groups[0])
    names = ("no regularizer", "dropout", "Disout, `alpha` 0", "Disout, `alpha` 5", "Disout, `alpha` 500")
    for name, group in zip(names, groups, strict=True):
        learned = [read_json(published / run.config["name"] / "summary.json")["learned_top1"] for run in group]
        trained = [run.last("train_top1") for run in group]
        figures = [spread(group, measure, "test_top1") for measure in (Run.best, Run.last)]
        cells = [name, *figures, *(f"{statistics.mean(values):.1f}" for values in (trained, learned))]
        assert f"| {' | '.join(cells)} |" in RESULTS
    hours = sum(row["seconds"] for group in groups for run in group for row in run.rows) / 3600
    assert f"small_table1.sh`, 25 runs, {hours:.1f} hours in all" in " ".join(RESULTS.split())
    said = "With `alpha` 5 the noise is {:.3f} and {:.3f} of the features' deviation after the two layers"
    assert f"{said}, with 500 {{:.2f}} and {{:.2f}}".format(*noise_sizes()) in " ".join(RESULTS.split())


def test_what_the_low_data_study_would_say_of_another_family_is_what_the_text_says():
    study = [run for run in read_runs(ROOT / "results/published") if run.study == "small_study"]
    none, dropblock, disout = (group for group in grouped(study) if len(group) == 8)  # in this order
    pairs = ((disout, none), (dropblock, none), (disout, dropblock))
    last, best = ([difference(*pair, measure).p for pair in pairs] for measure in (Run.last, Run.best))
    text = " ".join(RESULTS.split())
    of_three, of_six = holm(last), holm(last + best)
    assert f"p {last[0]:.3f}, corrected {of_three[0]:.3f} of three, {of_six[0]:.3f} of six" in text
    of_both = f"p {', '.join(f'{p:.3f}' for p in of_three[:2])} and {of_three[2]:.3f}, corrected for three"
    assert of_both in " ".join(README.split())


def of_complexity(form):
    names = ("train_top1", "test_top1", "gap", "complexity", "relative_complexity", "distortion")
    with (ROOT / "results/published/small_grid/complexity.csv").open() as file:
        return {format(float(row[name]), form) for row in csv.DictReader(file) for name in names}


def noise_sizes():
    """The means over the runs with alpha 5 and 500, each after both layers."""
    noise: dict[tuple[str, str], list[float]] = {}
    with (ROOT / "results/published/small_table1/noise_size.csv").open() as file:
        for row in csv.DictReader(file):
            noise.setdefault((row["alpha"], row["layer"]), []).append(float(row["noise"]))
    return [statistics.mean(noise[alpha, layer]) for alpha in ("5.0", "500.0") for layer in ("hidden1", "hidden2")]
