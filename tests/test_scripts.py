import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
import train_imagenet

ROOT = Path(train.__file__).parent
STUDIES = {"small_grid": 20, "small_study": 7, "small_table1": 5, "small_table1_grid": 27, "photographs_study": 3}
SCRIPTS = {
    "table1_cifar10": 4,
    "table1_cifar100": 4,
    "table2_cifar10": 3,
    "table2_cifar100": 3,
    "table3_imagenet": 10,
    **{f"studies/{study}": rows for study, rows in STUDIES.items()},
}


def printed(script, *flags, **environment):
    """The commands that a table's script would run, without a virtual environment or data."""
    everything = os.environ | {"DRY_RUN": "1"} | environment
    result = subprocess.run(
        ["bash", ROOT / "scripts" / f"{script}.sh", *flags], env=everything, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in result.stdout.splitlines()]


def flag_of(command, flag):
    return command[len(command) - command[::-1].index(flag)]


@pytest.mark.parametrize(("script", "count"), SCRIPTS.items())
def test_dry_run_prints_a_command_a_row_and_seed_under_its_own_name(script, count):
    commands = printed(script, SEEDS="0 5")
    assert len(commands) == 2 * count
    names = [flag_of(command, "--name") for command in commands]
    assert len(set(names)) == 2 * count
    assert all(name.endswith(f"-s{flag_of(command, '--seed')}") for name, command in zip(names, commands, strict=True))
    of_first = [command for command in commands if flag_of(command, "--seed") == "0"]
    assert len({str({**parsed(command), "name": ""}) for command in of_first}) == len(of_first) == count
    if script != "studies/small_study":  # whose main rows come first; else the first seed of all rows before the second
        assert commands[:count] == of_first


def parsed(command):
    script = {"train.py": train, "train_imagenet.py": train_imagenet}[command[1]]
    return script.parse_arguments(command[2:])[1]


def test_further_flags_come_last_and_override():
    for command in printed("table2_cifar10", "--epochs", "3", "--data_root", "my data", SEEDS="1"):
        settings = parsed(command)
        assert (settings["epochs"], settings["data_root"], settings["seed"]) == (3, "my data", 1)


def test_table2_is_the_published_recipe():
    rows = {flag_of(command, "--name"): parsed(command) for command in printed("table2_cifar10", SEEDS="0")}
    recipe = {"epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 1}
    recipe |= {"depth": 56, "augment": "standard", "label_smoothing": 0.0, "train_size": 0, "holdout": 0}
    assert all(recipe.items() <= row.items() for row in rows.values())
    assert {"dist_prob": 0.09, "alpha": 5.0, "block_size": 6}.items() <= rows["disout-s0"].items()
    assert {"dist_prob": 0.09, "alpha": 0, "block_size": 6}.items() <= rows["dropblock-s0"].items()


@pytest.mark.parametrize("command", printed("table1_cifar100", SEEDS="0"), ids=lambda command: command[-2])
def test_every_command_of_table1_does_a_step_without_augmentation(command, tmp_path):
    assert (parsed(command)["model"], parsed(command)["augment"], parsed(command)["holdout"]) == ("cnn", "none", 0)
    train.main([*command[2:], "--dataset", "digits", "--train_size", "8", "--epochs", "1", "--output", str(tmp_path)])
    assert (tmp_path / flag_of(command, "--name") / "summary.json").exists()


def test_the_grid_of_table1_has_six_trials_for_every_method():
    rows = [parsed(command) for command in printed("studies/small_table1_grid")]
    assert all((row["holdout"], row["train_size"], row["seed"], row["epochs"]) == (5000, 5000, 100, 30) for row in rows)
    for method in ("none", "dropout", "disout"):
        of_method = [row for row in rows if row["method"] == method and not row["constant_prob"]]
        assert len(of_method) >= 6


@pytest.mark.parametrize("command", printed("table2_cifar100", SEEDS="0"), ids=lambda command: command[5])
def test_every_command_of_table2_does_a_step(command, tmp_path):
    small = ["--dataset", "digits", "--depth", "8", "--train_size", "16", "--epochs", "1", "--output", str(tmp_path)]
    train.main([*command[2:], *small])
    assert (tmp_path / flag_of(command, "--name") / "summary.json").exists()


@pytest.mark.parametrize(
    "command", printed("table3_imagenet", SEEDS="0"), ids=lambda command: flag_of(command, "--name")
)
def test_every_command_of_table3_does_a_step(command, tmp_path, photographs_folder):
    small = ["--data", str(photographs_folder), "--image_size", "32", "--batch_size", "21", "--epochs", "1"]
    train_imagenet.main([*command[2:], *small, "--workers", "0", "--output", str(tmp_path)])
    assert (tmp_path / flag_of(command, "--name") / "summary.json").exists()


def test_a_script_runs_all_its_rows_from_any_folder(tmp_path):
    """small_study.sh has three sets of rows; python and setup.sh are replaced by what notes where and what ran."""
    for name, content in {
        "scripts/studies/small_study.sh": (ROOT / "scripts/studies/small_study.sh").read_text(),
        "scripts/rows.sh": (ROOT / "scripts/rows.sh").read_text(),
        "scripts/setup.sh": "",
        ".venv/bin/python": '#!/bin/sh\necho "$PWD $*" >> "$NOTES"\n',
    }.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    environment = os.environ | {"SEEDS": "0", "NOTES": str(tmp_path / "notes")}
    subprocess.run(["bash", "repository/scripts/studies/small_study.sh"], cwd=tmp_path, env=environment, check=True)
    ran = (tmp_path / "notes").read_text().splitlines()
    assert len(ran) == STUDIES["small_study"]
    assert all(line.startswith(f"{tmp_path}/repository train.py") for line in ran)


def test_jobs_share_out_the_cores_that_they_may_use(tmp_path):
    for name, content in {
        "scripts/table2_cifar10.sh": (ROOT / "scripts/table2_cifar10.sh").read_text(),
        "scripts/rows.sh": (ROOT / "scripts/rows.sh").read_text(),
        "scripts/setup.sh": "",
        ".venv/bin/python": '#!/bin/sh\n[ $1 = scripts/cores.py ] && echo 6 || echo $OMP_NUM_THREADS >> "$NOTES"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    environment = os.environ | {"SEEDS": "0", "NOTES": str(tmp_path / "notes"), "JOBS": "2"}
    subprocess.run(["bash", tmp_path / "scripts/table2_cifar10.sh"], env=environment, check=True)
    assert (tmp_path / "notes").read_text().split() == ["3"] * 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_are_those_of_the_affinity():
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os, runpy; os.sched_setaffinity(0, [{one}]); runpy.run_path('scripts/cores.py', run_name='__main__')"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "1\n"


CONTROL_GROUPS = {  # what a file system has, and the cores of it
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "without a quota": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 128),
    "less than a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "above it": (
        {
            "proc/self/cgroup": "0::/slurm/job\n",
            "sys/fs/cgroup/slurm/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpuset:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/docker/a\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",  # a container sees its own group as the mount
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a quota": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        128,
    ),
    "none": ({}, 128),
}


@pytest.mark.parametrize("case", CONTROL_GROUPS)
def test_cores_are_those_of_the_quota(tmp_path, monkeypatch, case):
    files, expected = CONTROL_GROUPS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(128), raising=False)
    assert runpy.run_path(str(ROOT / "scripts/cores.py"))["cores"](tmp_path) == expected


def test_the_script_passes_over_what_is_finished(tmp_path):
    """Through bash itself; it needs the virtual environment that scripts/setup.sh makes."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv: scripts/test.sh makes one")
    flags = ["--dataset", "digits", "--depth", "8", "--train_size", "16", "--epochs", "1", "--output"]
    command = ["bash", ROOT / "scripts/table2_cifar10.sh", *flags, tmp_path / "my runs"]
    outputs = [
        subprocess.run(
            command, env=os.environ | {"SEEDS": "0", "JOBS": "2"}, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert outputs[0].stdout.count("epoch 1/1") == 3
    assert outputs[1].stdout.count("is complete") == 3 and "epoch 1/1" not in outputs[1].stdout


def test_the_committed_page_is_what_the_committed_logs_give(tmp_path):
    published = ROOT / "results/published"
    names = ("config.json", "metrics.csv", "summary.json")
    logs = [log for log in published.glob("*/*/*") if log.name in names] + list(published.glob("*/*.csv"))
    for log in [*logs, *published.glob("benchmark/*.json")]:
        copy = tmp_path / log.relative_to(published)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(log.read_bytes())
    subprocess.run([sys.executable, ROOT / "scripts/make_tables.py", tmp_path], check=True)
    assert (tmp_path / "tables.md").read_text() == (published / "README.md").read_text()
    assert {path.relative_to(tmp_path) for path in tmp_path.glob("*/accuracy.png")} == {
        path.relative_to(published) for path in published.glob("*/accuracy.png")
    }
