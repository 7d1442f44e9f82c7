import json
import sys
from pathlib import Path

import pytest

import train

sys.path.insert(0, str(Path(train.__file__).parent / "scripts"))
import make_tables

ROWS = {row: settings for row, (_, settings) in make_tables.published_settings("table2_cifar10.sh").items()}


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
        epochs = "".join(f"{epoch},{value},99,60\n" for epoch, value in enumerate(top1, 1))
        (folder / "metrics.csv").write_text("epoch,test_top1,test_top5,seconds\n" + epochs)
        if complete:
            (folder / "summary.json").write_text("{}")

    return write


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page of what was published, as sections under their titles."""

    def make():
        monkeypatch.setattr(sys, "argv", ["make_tables.py", str(tmp_path)])
        make_tables.main()
        sections = (tmp_path / "README.md").read_text().split("## ")[1:]
        return {section.splitlines()[0]: section for section in sections}

    return make


def test_the_paper_table_has_mean_deviation_and_paired_difference(publish, page):
    for seed, none, disout in ((0, (90, 91), (93, 92)), (1, (92, 93), (94, 93)), (2, (91, 92), (90, 95))):
        publish("table2_cifar10", "none", ROWS["none"], seed, none)
        publish("table2_cifar10", "disout", ROWS["disout"], seed, disout)
    sections = page()
    table = sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "| no regularizer | 93.95 ± 0.09 | 92.00 ± 1.00 | 92.00 ± 1.00 |  | 3 | 2 |" in table
    # differences of the best epochs: 2, 1, 3; mean 2, deviation 1, t(0.975, 2) = 4.303
    assert "| 94.50 ± 0.15 | 94.00 ± 1.00 | 93.33 ± 1.53 | +2.00 (-0.48 to +4.48) | 3 | 2 |" in table
    assert "| DropBlock | 94.18 ± 0.14 | not run | not run |  | 0 |" in table
    assert "| DropBlock | 73.08 ± 0.23 | not run | `python train.py" in sections["Table 2, CIFAR-100 (ResNet-56)"]
    assert "|" not in sections["table2_cifar10"]
    assert "](table2_cifar10/accuracy.png)" in sections["table2_cifar10"]


@pytest.mark.parametrize("change", [{"epochs": 10}, {"batch_size": 256}, {"alpha": 4.0}, {"holdout": 5000}])
def test_a_run_off_the_recipe_stands_in_its_own_table(publish, page, change):
    publish("mine", "disout", {**ROWS["disout"], **change}, 0, (90, 91))
    sections = page()
    assert "91.00" not in sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "91.00" in sections["mine"]
    [(name, value)] = change.items()
    assert f"{name} {value:g}" in sections["mine"]


def test_precision_is_no_other_setting_in_a_paper_table_and_a_row_of_its_own_in_a_study(publish, page):
    for seed, settings in ((0, ROWS["none"]), (1, ROWS["none"] | {"amp": True, "precision": "bfloat16 autocast"})):
        publish("table2_cifar10", "none", settings, seed, (90, 90 + seed))
        publish("mine", "none", settings | {"epochs": 2}, seed, (80, 80 + seed))
        publish("mine", "disout", settings | {"epochs": 2, "method": "disout"}, seed, (81, 83 + seed))
    sections = page()
    assert "| 90.50 ± 0.71 | 90.50 ± 0.71 |  | 2 | 2 |" in sections["Table 2, CIFAR-10 (ResNet-56)"]
    assert "bfloat16 autocast, float32" in sections["Table 2, CIFAR-10 (ResNet-56)"]
    rows = [line.split(" | ") for line in sections["mine"].splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| none", "| none, bfloat16", "| disout", "| disout, bfloat16"]
    assert [row[4].split(" (")[0] for row in rows] == ["", "", "+3.00", "+3.00"]


def test_a_run_that_is_not_complete_stands_nowhere(publish, page):
    publish("mine", "disout", ROWS["disout"], 0, (90, 91), complete=False)
    publish("mine", "disout", ROWS["disout"], 1, (88, 89))
    table = page()["Table 2, CIFAR-10 (ResNet-56)"]
    assert "89.00" in table and "91.00" not in table


def test_runs_without_a_study_count_and_no_run_at_all_is_said(publish, page):
    with pytest.raises(SystemExit, match="no complete run"):
        page()
    publish(".", "disout", ROWS["disout"], 0, (90, 91))
    assert "91.00" in page()["Table 2, CIFAR-10 (ResNet-56)"]


def test_the_number_of_processes_is_no_other_setting_but_is_shown(publish, page):
    _, settings = make_tables.published_settings("table3_imagenet.sh")["disout"]
    config = {**settings, "processes": 8, "command": "python train_imagenet.py"}
    publish("eight", "disout", config, 0, (70, 71))
    table = page()["Table 3, ImageNet (ResNet-50)"]
    assert "71.00" in table and "8 x a CPU" in table


def test_a_flag_that_is_younger_than_the_run_had_its_default(publish, page):
    settings = {name: value for name, value in ROWS["none"].items() if name != "label_smoothing"}
    publish("old", "none", settings, 0, (90, 91))
    assert "91.00" in page()["Table 2, CIFAR-10 (ResNet-56)"]
