import json
import sys
from pathlib import Path

import pytest

import train

sys.path.insert(0, str(Path(train.__file__).parent / "scripts"))
import make_tables
import runs

from utils.checkpoint import CheckpointError
from utils.flags import UsageError

ROWS = {row: settings for row, (_, settings) in runs.published_settings("table2_cifar10.sh").items()}


@pytest.fixture
def publish(tmp_path):
    """Writes a run's logs, of two epochs with these accuracies, under a study's folder."""

    def write(study, name, settings, seed, top1, complete=True):
        folder = tmp_path / study / f"{name}-s{seed}"
        folder.mkdir(parents=True)
        config = {
            "command": "python train.py",
            "device": "cpu",
            "device_name": "a CPU",
            "threads": 2,
            **settings,
            "seed": seed,
        }
        (folder / "config.json").write_text(json.dumps(config))
        epochs = "".join(f"{epoch},95,{value},99,60\n" for epoch, value in enumerate(top1, 1))
        (folder / "metrics.csv").write_text("epoch,train_top1,test_top1,test_top5,seconds\n" + epochs)
        if complete:
            (folder / "summary.json").write_text("{}")

    return write


@pytest.fixture
def page(tmp_path):
    """The page of what was published, as sections under their titles."""

    def make():
        make_tables.main([str(tmp_path)])
        sections = (tmp_path / "tables.md").read_text().split("## ")[1:]
        return {section.splitlines()[0]: section for section in sections}

    return make


def test_the_paper_table_has_mean_deviation_and_paired_difference(publish, page):
    for seed, none, disout in ((0, (90, 91), (93, 92)), (1, (92, 93), (94, 93)), (2, (91, 92), (90, 95))):
        publish("table2_cifar10", "none", ROWS["none"], seed, none)
        publish("table2_cifar10", "disout", ROWS["disout"], seed, disout)
    sections = page()
    table = sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "| no regularizer | 93.95 ± 0.09 | 92.00 ± 1.00 | 92.00 ± 1.00 | 3 | 2 |" in table
    assert "| 94.50 ± 0.15 | 94.00 ± 1.00 | 93.33 ± 1.53 | 3 | 2 |" in table
    assert "| DropBlock | 94.18 ± 0.14 | not run | not run | 0 |" in table
    assert "| Block Feature Map Distortion, cpu, float32 | DropBlock" not in table
    # differences of the best epochs: 2, 1, 3; mean 2, deviation 1, t(0.975, 2) = 4.303; of the last: 1, 0, 3
    found = "+1.33 (-2.46 to +5.13) | +2.00 (-0.48 to +4.48) | 3 | not significant, p 0.270 of 1 |"
    assert f"| Block Feature Map Distortion, cpu, float32 | no regularizer, cpu, float32 | {found}" in table
    assert table.count("no regularizer, cpu") == 1
    assert "| DropBlock | 73.08 ± 0.23 | not run | `python train.py" in sections["Table 2, CIFAR-100 (ResNet-56)"]
    assert "](table2_cifar10/accuracy.png)" in table and "table2_cifar10" not in sections


def test_a_lines_command_is_that_of_its_first_run_without_what_is_its_own(publish, page):
    command = "python train.py --amp --seed 1 --output 'results/my runs' --name none-s1 --method none --resume"
    publish("mine", "none", ROWS["none"] | {"command": command}, 1, (90, 91))
    assert "`python train.py --amp --method none`" in page()["Table 2, CIFAR-10 (ResNet-56)"]
    publish("study", "none", ROWS["none"] | {"command": f"{command} --depth 20", "depth": 20}, 1, (90, 91))
    assert "`python train.py --amp --method none --depth 20`" in page()["study"]


def test_a_seed_that_was_run_twice_counts_once(publish, page):
    for study, top1 in (("a", (90, 91)), ("b", (94, 95))):
        publish(study, "disout", ROWS["disout"], 0, top1)
    publish("a", "again", ROWS["disout"] | {"epochs": 10}, 0, (80, 81))
    publish("a", "once more", ROWS["disout"] | {"epochs": 10}, 0, (70, 71))
    sections = page()
    assert "| 94.50 ± 0.15 | 91.00 | 91.00 | 1 | 2 |" in sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "81.00" in sections["a"] and "71.00" not in sections["a"]


def test_runs_on_a_gpu_have_a_line_of_their_own(publish, page):
    for device, none, dropblock, disout in (("cpu", 91, 91, 92), ("cuda", 93, 94.5, 95)):
        for method, top1 in (("none", none), ("dropblock", dropblock), ("disout", disout)):
            publish(device, method, ROWS[method] | {"device": device}, 0, (top1, top1))
    table = page()["Table 2, CIFAR-10 (ResNet-56)"]
    assert "| 94.50 ± 0.15 | 92.00 | 92.00 | 1 |" in table
    assert "| 94.50 ± 0.15 | 95.00 | 95.00 | 1 |" in table
    assert "Distortion, cpu, float32 | no regularizer, cpu, float32 | +1.00 (one seed) |" in table
    assert "Distortion, cuda, float32 | no regularizer, cuda, float32 | +2.00 (one seed) |" in table
    assert "| Block Feature Map Distortion, cuda, float32 | DropBlock, cuda, float32 | +0.50 (one seed) |" in table


def test_a_run_that_went_on_in_another_precision_is_neither(publish, page):
    for seed, precision in enumerate(("float32", "bfloat16 autocast", "bfloat16 autocast, then float32")):
        settings = {"epochs": 10, "amp": precision != "float32", "precision": precision}
        publish("mine", "none", ROWS["none"] | settings, seed, (90, 91 + seed))
    section = page()["mine"]
    for label, top1 in (("none", 91), ("none, bfloat16", 92), ("none, bfloat16 autocast, then float32", 93)):
        assert f"| {label} | {top1}.00 |" in section


def test_methods_may_have_learning_rates_of_their_own_and_a_grid_compares_none(publish, page):
    for seed in (0, 1):
        for study, holdout in (("study", 0), ("grid", 5000)):
            small = {"epochs": 2, "holdout": holdout}
            publish(study, "none", ROWS["none"] | small | {"lr": 0.1, "weight_decay": 1e-3}, seed, (80, 81 + seed))
            publish(study, "disout", ROWS["disout"] | small | {"lr": 0.2}, seed, (80, 83 + seed))
            publish(study, "more", ROWS["disout"] | small | {"train_size": 9}, seed, (80, 85 + seed))
    sections = page()
    lines = sections["study"].split("Paired")[1].splitlines()
    pairs = [line.split(" | ")[:3] for line in lines if line.startswith("| ")]
    assert pairs[1:] == [["| disout, p 0.09, block 6, alpha 5", "none", "+2.00 (+2.00 to +2.00)"]]
    assert "Paired" not in sections["grid"]


@pytest.mark.parametrize(
    "change", [{"epochs": 10}, {"batch_size": 256}, {"alpha": 4.0}, {"holdout": 5000}, {"init": "best.pt"}]
)
def test_a_run_off_the_recipe_stands_in_its_own_table(publish, page, change):
    publish("mine", "disout", {**ROWS["disout"], **change}, 0, (90, 91))
    sections = page()
    assert "91.00" not in sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "91.00" in sections["mine"]
    [(name, value)] = change.items()
    assert f"{name} {value}".removesuffix(".0") in sections["mine"]


def test_a_setting_that_differs_between_rows_is_said_of_each(publish, page):
    for rate in (0.05, 0.1):  # 0.1 is the recipe's
        publish("mine", f"lr{rate}", ROWS["none"] | {"epochs": 2, "lr": rate}, 0, (90, 91))
    section = page()["mine"]
    assert "All rows: off the recipe in epochs 2;" in section
    assert "| lr 0.05 |" in section and "| lr 0.1 |" in section


def rows_of(section):
    """The cells of the lines of a section's tables, without the lines under the headers."""
    lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {tuple(cells[:2]) if cells[4:5] == ["2"] else cells[0]: cells for cells in lines}


def test_a_study_has_paired_differences_in_numbers_and_words(publish, page):
    small = {name: value for name, value in ROWS["none"].items() if name not in ("alpha", "dist_prob", "block_size")}
    small |= {"depth": 20, "alpha": 0, "dist_prob": 0, "block_size": 0}
    methods = {
        "none": small,
        "dropblock": small | {"method": "dropblock", "dist_prob": 0.1, "block_size": 6},
        "disout": small | {"method": "disout", "dist_prob": 0.1, "block_size": 6, "alpha": 5.0},
    }
    accuracies = {"none": ((80, 79), (82, 81)), "dropblock": ((79, 78), (81, 80)), "disout": ((90, 70), (93, 71))}
    for method, of_seeds in accuracies.items():
        for seed, top1 in enumerate(of_seeds):
            publish("mine", method, methods[method], seed, top1)
    section = page()["mine"]
    assert "All rows: off the recipe in depth 20;" in section
    found = rows_of(section)
    assert found["none"][1:4] == ["81.00 ± 1.41", "80.00 ± 1.41", "2"]
    disout, dropblock = "disout, p 0.1, block 6, alpha 5", "dropblock, p 0.1, block 6"
    assert "| 10.50" not in section
    # last epoch: -9 and -10; t(0.975, 1) = 12.706, so -9.5 -+ 12.706 * 0.7071 / sqrt(2)
    assert found[disout, "none"][2] == "-9.50 (-15.85 to -3.15)"
    # Its interval leaves 0 out, but t = 19 has p = 0.0335, which the correction over three doubles, as one is smaller;
    # t = 17, p = 0.0374, is not below that.
    assert found[disout, "none"][5] == "not significant, p 0.067 of 3"
    assert found[dropblock, "none"][2:] == ["-1.00 (-1.00 to -1.00)"] * 2 + ["2", "lower, p < 0.001 of 3"]
    assert found[disout, dropblock][5] == "not significant, p 0.067 of 3"
    assert not any(key[0] == "none" for key in found if isinstance(key, tuple))


def test_holms_correction_by_hand():
    assert runs.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert runs.holm([0.5, 0.6]) == [1.0, 1.0] and runs.holm([]) == []


def test_a_primary_contrast_is_not_corrected_and_first_looks_have_no_verdict(publish, page, monkeypatch):
    small = ROWS["none"] | {"depth": 20}
    for study in ("mine", "first_look"):
        for seed, (none, disout) in enumerate(((79, 70), (81, 71))):
            publish(study, "none", small, seed, (0, none))
            publish(study, "disout", ROWS["disout"] | {"depth": 20}, seed, (0, disout))
    pair = ("disout, p 0.09, block 6, alpha 5", "none")
    monkeypatch.setitem(make_tables.PRIMARY, "mine", pair)
    sections = page()
    assert rows_of(sections["mine"])[pair][5] == "the primary contrast: lower, p 0.033"
    assert rows_of(sections[make_tables.TITLES["first_look"]])[pair][4:] == ["2", ""]


def test_other_settings_of_disout_are_also_compared_to_the_scripts_own_and_a_label_says_what_differs(publish, page):
    default = ROWS["disout"] | {"epochs": 2, "augment": "none"}
    for seed in (0, 1):
        publish("mine", "disout", default, seed, (80, 80 + seed))
        publish("mine", "inside", default | {"inside": True}, seed, (80, 82 + seed))
        publish("mine", "alpha", default | {"alpha": 20.0}, seed, (80, 79 + seed))
    section = page()["mine"]
    found = rows_of(section)
    assert "All rows: augment none; off the recipe in epochs 2" in section
    disout = "disout, p 0.09, block 6, alpha 5"
    pairs = [key for key in found if isinstance(key, tuple) and key[0]]
    assert pairs == [("disout, p 0.09, block 6 inside, alpha 5", disout), ("disout, p 0.09, block 6, alpha 20", disout)]
    assert found[pairs[0]][2] == "+2.00 (+2.00 to +2.00)"


def test_a_picture_of_many_settings_shows_those_with_the_most_seeds():
    settings = [["a run"] * seeds for seeds in (8, 8, 4, 8, 4)]
    assert make_tables.to_draw(settings) == [settings[0], settings[1], settings[3]]
    assert make_tables.to_draw(settings[1:]) == settings[1:]


def test_a_precision_has_a_row_of_its_own_in_a_paper_table_and_in_a_study(publish, page):
    bfloat16 = {"amp": True, "precision": "bfloat16 autocast"}
    publish("table2_cifar10", "none", ROWS["none"], 0, (90, 90))
    publish("table2_cifar10", "none", ROWS["none"] | bfloat16, 1, (90, 91))
    for seed in (0, 1):
        publish("mine", "none", ROWS["none"] | {"epochs": 2}, seed, (80, 80 + seed))
        publish("mine", "none-bf16", ROWS["none"] | {"epochs": 2} | bfloat16, seed, (80, 81 + seed))
    sections = page()
    table = sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "| 90.00 | 90.00 | 1 | 2 | 2.0 | float32 |" in table
    assert "| 91.00 | 91.00 | 1 | 2 | 2.0 | bfloat16 autocast |" in table
    found = rows_of(sections["mine"])
    assert found["none"][2] == "80.50 ± 0.71" and found["none, bfloat16"][2] == "81.50 ± 0.71"
    assert found["none, bfloat16", "none"][2] == "+1.00 (+1.00 to +1.00)"


def test_settings_that_share_no_precision_with_the_others_are_a_table_of_their_own(publish, page):
    small = ROWS["none"] | {"epochs": 2}
    for seed in (0, 1):
        publish("mine", "none", small, seed, (80, 80 + seed))
        publish("mine", "lr", small | {"lr": 0.2}, seed, (80, 81 + seed))
        publish("mine", "bf16", small | {"amp": True, "precision": "bfloat16 autocast"}, seed, (80, 82 + seed))
    tables = page()["mine"].split("Paired")[0].split("\n\n|")[1:]
    assert ["| none | 80.50" in table for table in tables] == [True, False]
    assert ["| none, bfloat16 | 82.50" in table for table in tables] == [False, True]


def test_published_studies_have_titles_and_an_order_and_the_contents_lead_to_every_section(publish, page, tmp_path):
    for study in ("another", "quickstart", "small_grid", "small_study"):
        publish(study, "none", ROWS["none"] | {"epochs": 2}, 0, (80, 80))
    titles = list(page())
    assert [title for title in titles if not title.startswith("Table")] == [
        "The low-data study: ResNet-20 on 5,000 images of CIFAR-10",
        "Grid of the low-data study, on held-out images",
        "The quickstart",
        "another",
    ]
    assert titles[0].startswith("Table 1")
    contents = (tmp_path / "tables.md").read_text().split("\n\n")[2].splitlines()
    assert contents == [f"- [{title}](#{make_tables.anchor(title)})" for title in titles]
    assert "](#table-2-cifar-10-resnet-56)" in contents[2]


def test_the_readme_has_the_first_table_of_the_paper_that_ran(publish, tmp_path):
    readme = "before\n{}{}after\n".format(*make_tables.MARKERS)
    published = {title: runs.published_settings(f"{table.script}.sh") for title, table in make_tables.PAPER.items()}

    def table():
        return make_tables.readme_table(published, runs.read_runs(tmp_path))

    publish("mine", "none", ROWS["none"] | {"epochs": 2}, 0, (80, 80))
    assert table() == "" and make_tables.with_table(readme, table()) == readme
    publish("table1_cifar10", "none", TABLE_1["none"], 0, (81, 82))
    assert table().startswith("| Table 1, CIFAR-10") and "rerun" not in table()
    for seed in (0, 1):
        command = "python train.py --method none --seed 0 --device cuda --amp"
        publish("table2_cifar10", "none", ROWS["none"] | {"command": command}, seed, (94, 93))
    publish("table2_cifar10", "disout", ROWS["disout"] | {"device": "cuda", "device_name": "a GPU"}, 0, (94, 95))
    publish("twice", "none", ROWS["none"], 0, (90, 91))  # a seed counts once
    lines = table().splitlines()
    assert (
        lines[0]
        == "| Table 2, CIFAR-10 (ResNet-56) | paper, best epoch | ours, best epoch | ours, last epoch | seeds |"
    )
    assert lines[2:5] == [
        "| no regularizer | 93.95 ± 0.09 | 94.00 ± 0.00 | 93.00 ± 0.00 | 2 |",
        "| DropBlock | 94.18 ± 0.14 | not run | not run | 0 |",
        "| Block Feature Map Distortion | 94.50 ± 0.15 | 95.00 | 95.00 | 1 |",
    ]
    command = "`bash scripts/table2_cifar10.sh --device cuda --amp`"
    assert " ".join(lines[6:]) == (
        f"0.0 hours a run, a CPU, threads: 2; a GPU. [Logs](results/published/table2_cifar10) · {command}"
    )
    once = make_tables.with_table(readme, table())
    assert once.startswith("before\n") and once.endswith("after\n") and table() in once
    assert make_tables.with_table(once, table()) == once


def test_benchmarks_have_a_page_and_those_of_other_machines_or_rows_a_table_each(publish, page, tmp_path):
    publish("mine", "disout", ROWS["disout"], 0, (90, 91))
    (tmp_path / "benchmark").mkdir()
    for name, machine, figures in (
        ("cpu_1", "a CPU", {"step": 1.5}),
        ("cpu_2", "a CPU", {"step": 1.7}),
        ("gpu", "a GPU", {"step": 0.2}),
        ("gpu_compiled", "a GPU", {"step": 0.2, "compiled": 0.1}),
    ):
        rows = [{"what": what, "median": x, "at_most": 1.6, "at_least": None} for what, x in figures.items()]
        (tmp_path / f"benchmark/{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    assert "](benchmark/README.md)" in page()["Benchmark"]
    text = (tmp_path / "benchmark/README.md").read_text()
    assert "2 runs (cpu_1, cpu_2): a CPU" in text
    assert "1 run (gpu): a GPU" in text and "1 run (gpu_compiled): a GPU" in text
    assert "| step | 1.5, 1.7 |" in text and text.count("| step | 0.2 |") == 2


def test_a_run_that_is_not_complete_stands_nowhere(publish, page):
    publish("mine", "disout", ROWS["disout"], 0, (90, 91), complete=False)
    publish("mine", "disout", ROWS["disout"], 1, (88, 89))
    table = page()["Table 2, CIFAR-10 (ResNet-56)"]
    assert "89.00" in table and "91.00" not in table


def test_runs_without_a_study_count_and_no_run_at_all_is_said(publish, page):
    with pytest.raises(UsageError, match="no complete run"):
        page()
    publish(".", "disout", ROWS["disout"], 0, (90, 91))
    assert "91.00" in page()["Table 2, CIFAR-10 (ResNet-56)"]


def test_into_how_many_shares_a_batch_goes_is_no_other_setting(publish, page):
    _, settings = runs.published_settings("table3_imagenet.sh")["disout"]
    config = {**settings, "processes": 8, "command": "python train_imagenet.py"}
    publish("eight", "disout", config, 0, (70, 71))
    publish("parts", "disout", config | {"processes": 1, "accumulate_steps": 8}, 1, (72, 73))
    table = page()["Table 3, ImageNet (ResNet-50)"]
    assert "72.00 ± 1.41" in table and "8 x a CPU" in table


def test_a_flag_that_is_younger_than_the_run_had_its_default(publish, page):
    settings = {name: value for name, value in ROWS["none"].items() if name != "label_smoothing"}
    publish("old", "none", settings, 0, (90, 91))
    assert "91.00" in page()["Table 2, CIFAR-10 (ResNet-56)"]


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "[]"), ("metrics.csv", "epoch,top1\n1\n"), ("metrics.csv", "")]
)
def test_a_log_that_cannot_be_read_is_named(publish, page, tmp_path, name, content):
    publish("mine", "disout", ROWS["disout"], 0, (90, 91))
    (tmp_path / "mine/disout-s0" / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"disout-s0/{name} cannot be read"):
        page()


TABLE_1 = {row: settings for row, (_, settings) in runs.published_settings("table1_cifar10.sh").items()}
DISTORTION = "Feature Map Distortion"


def test_table_1_has_the_papers_figures_a_third_partys_and_ours(publish, page):
    for seed in (0, 1):
        publish("table1_cifar10", "none", TABLE_1["none"], seed, (80, 81 + seed))
        publish("table1_cifar10", "alpha0", TABLE_1["disout-alpha0"], seed, (80, 83 + seed))
        publish("table1_cifar10", "disout", TABLE_1["disout"], seed, (80, 84 + seed))
    sections = page()
    table = sections["Table 1, CIFAR-10 (plain CNN, fully connected layers)"]
    assert "jiahy0825/Disout" in table and "83.11" in table
    same = "81.50 ± 0.71"
    assert f"| no regularizer (jiahy0825's rerun: 85.66) | 81.99 | {same} | {same} | 2 |" in table
    assert "| Dropout | unknown to us | not run | not run | 0 |" in table
    assert "| Feature Map Distortion (jiahy0825's rerun: 87.53) | 85.24 | 84.50" in table
    found = rows_of(table)
    disout, alpha0, none = (f"{row}, cpu, float32" for row in (DISTORTION, "Zeros where it distorts", "no regularizer"))
    for one, other, mean in ((disout, none, "+3.00"), (disout, alpha0, "+1.00"), (alpha0, none, "+2.00")):
        assert found[one, other][2] == f"{mean} ({mean} to {mean})"
    assert not any("Dropout, cpu" in key for key in found)
    assert "| 49.72 | not run |" in sections["Table 1, CIFAR-100 (plain CNN, fully connected layers)"]
    assert "81.50" not in sections["Table 2, CIFAR-10 (ResNet-56)"]


def test_a_run_of_the_cnn_is_never_taken_for_one_of_a_resnet_nor_compared_to_it(publish, page):
    """Also where all its other settings are those of Table 2; and a run that is older than --model is a ResNet's."""
    publish("mine", "cnn", ROWS["none"] | {"model": "cnn"}, 0, (90, 91))
    old = {name: value for name, value in ROWS["none"].items() if name != "model"}
    for seed in (0, 1):
        publish("both", "resnet", old | {"epochs": 2}, seed, (80, 82))
        publish("both", "cnn", TABLE_1["disout"] | {"epochs": 2}, seed, (80, 84))
    publish("old", "none", old, 0, (90, 93))
    sections = page()
    table_2 = sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "93.00" in table_2 and "91.00" not in table_2
    assert "model cnn" in sections["both"] and "Paired" not in sections["both"]
    assert not any("91.00" in sections[title] for title in sections if title.startswith("Table"))


def test_scripts_that_look_at_a_resnets_maps_refuse_another_network(tmp_path):
    for config in ('{"model": "cnn", "dataset": "cifar10"}', '{"dataset": "imagenet"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UsageError, match="with a ResNet"):
            runs.load_trained(tmp_path)


def test_features_are_compared_to_dropout_and_alpha_0_is_said(publish, page):
    for seed in (0, 1):
        for row, top1 in (("none", 60), ("dropout", 62), ("disout-alpha0", 63), ("disout", 66)):
            rate = 0 if row == "none" else 0.5
            publish("mine", row, TABLE_1[row] | {"epochs": 2, "dist_prob": rate}, seed, (50, top1 + seed))
    found = rows_of(page()["mine"])
    disout, alpha0 = "disout, p 0.5, block 1, alpha 500", "disout, p 0.5, block 1, alpha 0"
    for one, other, mean in (
        (disout, "none", "+6.00"),
        (disout, "dropout, p 0.5", "+4.00"),
        (alpha0, disout, "-3.00"),
    ):
        assert found[one, other][2].startswith(mean)
