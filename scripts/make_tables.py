"""Writes the tables of a folder of runs, and a picture of each study in it: README.md into results/published, and the
first table of the paper that ran into the repository's README; or tables.md into another FOLDER.

usage: python scripts/make_tables.py [FOLDER]

Every figure comes from config.json and metrics.csv of FOLDER/STUDY/NAME or FOLDER/NAME. A complete run of a published
setting enters the paper's table; any other stands in its study's table. The seeds of a setting are one row: mean and
deviation, and the paired differences to the same seeds of the baselines, with a 95 % interval. The figures of
benchmark.py in FOLDER/benchmark/*.json are a page of their own, FOLDER/benchmark/README.md.
"""

import json
import sys
from pathlib import Path

from cells import CONDITIONS, anchor, command_of, conditions, markdown, paired_differences
from paper_tables import PAPER, paper_table, readme_table
from runs import (
    ROOT,
    Run,
    difference,
    differing,
    grouped,
    in_common,
    label,
    off_recipe,
    precision,
    published_settings,
    read_runs,
    references,
    spread,
)
from studies.draw_study import MOST_CURVES, draw_study

from utils.failures import run_script
from utils.files import replacing
from utils.flags import Parser, UsageError, file_path

FEW = 4  # settings; of more, a picture shows those with the most seeds
# What the published studies are, in the page's order. Others follow under their folders' names.
STUDIES = {
    "small_study": "The low-data study: ResNet-20 on 5,000 images of CIFAR-10",
    "small_table1": "The Table 1 study: its network on 5,000 images of CIFAR-10",
    "bfloat16": "bfloat16 against float32",
}
GRIDS = {
    "small_grid": "Grid of the low-data study, on held-out images",
    "small_table1_grid": "Grid of the Table 1 study, on held-out images",
    "small_table1_epochs": "The same in 20 epochs, which were too few",
}
FIRST_LOOKS = {
    "photographs_study": "First look: ResNet-50 on 3,000 photographs",
    "first_look": "First look: ResNet-20 on all of CIFAR-10, ten epochs",
    "imagenette_first_look": "First look: ResNet-50 on Imagenette",
    "one_epoch": "One epoch of the authors' command",
    "quickstart": "The quickstart",
}
# The one contrast that was set down before a study's first run.
PRIMARY = {"small_table1": ("disout, p 0.3, block 1, alpha 500", "dropout, p 0.3")}
TITLES = STUDIES | GRIDS | FIRST_LOOKS
INTRO = (
    "Written by `python scripts/make_tables.py` from the logs beside it. Accuracies in %: *last* is that of the last "
    "epoch, *best* that of the best epoch on the images evaluated, as the paper reports it, which flatters. ± is the "
    "standard deviation over seeds. Differences are paired by seed, with a 95 % interval (Student's t) where there are "
    "two seeds or more. Words are about the last epoch, at 5 %: p values have Holm's correction over all contrasts of "
    "the section between rows that have all its seeds (`of 3`: one of three), but for a primary contrast, which was "
    "set down before the first run. Best epochs, rows with fewer seeds and first looks have intervals alone. Of a "
    "setting and seed that was run twice, the first by name counts. Minutes are the median of the runs; some had other "
    "work beside them."
)
MARKERS = ("<!-- The paper's table, by scripts/make_tables.py -->\n", "<!-- The paper's table ends -->\n")


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=file_path, nargs="?", metavar="FOLDER", help="default: results/published")
    given = parser.parse_args(argv).folder
    folder = Path(given) if given else ROOT / "results/published"
    page = folder / ("tables.md" if given else "README.md")
    runs = read_runs(folder)
    if not runs:
        raise UsageError(f"no complete run in {folder}/STUDY/NAME or {folder}/NAME")
    published = {title: published_settings(f"{table.script}.sh") for title, table in PAPER.items()}
    on_recipe = [settings for rows in published.values() for _, settings in rows.values()]

    sections: dict[str, list[str]] = {}  # under their titles
    pictures = {study: picture_of(folder, study, runs) for study in in_order({run.study for run in runs})}
    for title, rows in published.items():
        sections[title] = paper_table(title, rows, runs) + pictures.pop(PAPER[title].script, [])
    for study, picture in pictures.items():
        others = [run for run in runs if run.study == study and all(differing(run, of) for of in on_recipe)]
        if others:
            sections[title_of(study)] = study_section(folder, study, grouped(others)) + picture
    if list(folder.glob("benchmark/*.json")):
        benchmark = folder / "benchmark/README.md"
        write(benchmark, ["# Benchmark", *benchmark_tables(folder)])
        sections["Benchmark"] = ["What the layer and a step cost: [a page of its own](benchmark/README.md)."]
    contents = "\n".join(f"- [{title}](#{anchor(title)})" for title in sections)
    texts = [text for title, parts in sections.items() for text in (f"## {title}", *parts)]
    write(page, ["# Published runs", INTRO, contents, *texts])
    if not given:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        write(ROOT / "README.md", [with_table(readme, readme_table(published, runs)).rstrip("\n")])


def write(path: Path, texts: list[str]) -> None:
    with replacing(path) as partial:
        partial.write_text("\n\n".join(texts) + "\n", "utf-8")


def with_table(readme: str, table: str) -> str:
    """The README with this between its markers."""
    before, rest = readme.split(MARKERS[0])
    return before + MARKERS[0] + (f"{table}\n" if table else "") + MARKERS[1] + rest.split(MARKERS[1])[1]


def in_order(studies: set[str]) -> list[str]:
    return [study for study in TITLES if study in studies] + sorted(studies - TITLES.keys())


def title_of(study: str) -> str:
    return "Runs without a study" if study == "." else TITLES.get(study, study)


def picture_of(folder: Path, study: str, runs: list[Run]) -> list[str]:
    """Draws a study, and gives the line that shows it; nothing where there are too many lines or too few epochs."""
    members = [run for run in runs if run.study == study]
    shown = to_draw(grouped(members))
    if all(len(run.rows) == 1 for run in members) or len(shown) > MOST_CURVES:
        return []
    draw_study(folder / study / "accuracy.png", title_of(study), shown)
    return [f"![accuracy over epochs]({study}/accuracy.png)"]


def to_draw(groups: list[list[Run]]) -> list[list[Run]]:
    """The groups; of more than a few, those with the most seeds."""
    most = max(len(group) for group in groups)
    return groups if len(groups) <= FEW else [group for group in groups if len(group) == most]


def study_section(folder: Path, study: str, groups: list[list[Run]]) -> list[str]:
    """Runs off the published recipe: the script, a table for those that share precision and epochs, the paired
    differences of all, and what else was measured."""
    scripts = [ROOT / place / f"{study}.sh" for place in ("scripts", "scripts/studies")]
    has_script = any(script.exists() for script in scripts)
    sections = [f"Run by `bash {script.relative_to(ROOT)}`." for script in scripts if script.exists()]
    in_all = in_common(groups)
    for part in alike(groups):
        sections += settings_table(part, in_all, has_script)
    pairs = [
        (label(group[0], in_all), group, label(other[0], in_all), other)
        for group in groups
        for other in references(group, groups)
    ]
    pairs = [pair for pair in pairs if (found := difference(pair[1], pair[3], Run.last)) and found.pairs > 1]
    sections += paired_differences(pairs, PRIMARY.get(study), study not in FIRST_LOOKS)
    for script in ("complexity", "noise_size"):
        if (folder / study / f"{script}.csv").exists():
            sections.append(f"`python scripts/studies/{script}.py` measured [{script}.csv]({study}/{script}.csv).")
            picture = f"![accuracy, gap and complexity over rate and alpha]({study}/complexity.png)"
            sections += [picture] if script == "complexity" else []
    return sections


def alike(groups: list[list[Run]]) -> list[list[list[Run]]]:
    """The groups by precision and epochs, unless each would stand alone."""
    parts: dict[tuple[str, int], list[list[Run]]] = {}
    for group in groups:
        parts.setdefault((precision(group[0]), len(group[0].rows)), []).append(group)
    return [groups] if all(len(part) == 1 for part in parts.values()) else list(parts.values())


def settings_table(groups: list[list[Run]], in_all: frozenset[str], has_script: bool) -> list[str]:
    """A sentence with what all settings share, and a row each. The commands are left out where the study's script has
    them."""
    lines = [["", "best", "last", "off the recipe in", *CONDITIONS, "command"]]
    aparts = off_recipe(groups)
    in_every_row = [text for text in aparts[0] if len(groups) > 1 and all(text in apart for apart in aparts)]
    for group, apart in zip(groups, aparts, strict=True):
        figures = [spread(group, measure, "test_top1") for measure in (Run.best, Run.last)]
        cells = [label(group[0], in_all), *figures, ", ".join(text for text in apart if text not in in_every_row)]
        lines.append([*cells, *conditions(group), f"`{command_of(group[0])}`"])
    shared, columns = sorted(in_all - {precision(groups[0][0])}), list(zip(*lines, strict=True))
    shared += [f"off the recipe in {', '.join(in_every_row)}"] if in_every_row else []
    for column in columns[3:]:
        name, *values = column
        if name == "command" and has_script:
            columns.remove(column)
        elif len(values) > 1 and len(set(values)) == 1 and name != "runs":
            columns.remove(column)
            shared += [f"{name} {values[0]}"] if values[0] else []
    sentence = [f"All rows: {'; '.join(shared)}."] if shared else []
    return [*sentence, markdown([list(line) for line in zip(*columns, strict=True)])]


def benchmark_tables(folder: Path) -> list[str]:
    """The medians of benchmark.py: a table for the runs on one machine that measured the same."""
    alike: dict[tuple, list[dict]] = {}
    for path in sorted(folder.glob("benchmark/*.json")):
        benchmark = json.loads(path.read_text(encoding="utf-8")) | {"name": path.stem}
        alike.setdefault((benchmark["machine"], *(row["what"] for row in benchmark["rows"])), []).append(benchmark)
    tables = []
    for (machine, *_), benchmarks in alike.items():
        lines = [["", "measured, a run each"]]
        for rows in zip(*(benchmark["rows"] for benchmark in benchmarks), strict=True):
            lines.append([rows[0]["what"], ", ".join(f"{row['median']:.3g}" for row in rows)])
        count = f"{len(benchmarks)} {'run' if len(benchmarks) == 1 else 'runs'}"
        names = ", ".join(benchmark["name"] for benchmark in benchmarks)
        tables.append(f"`python scripts/benchmark.py`, {count} ({names}): {machine}.\n\n{markdown(lines)}")
    return tables


if __name__ == "__main__":
    run_script("make_tables.py", main, sys.argv[1:])
