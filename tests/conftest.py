import csv
import json
from pathlib import Path

import pytest

import train


@pytest.fixture
def run(tmp_path):
    """Runs train.py in this process, on the digits with the smallest ResNet; returns the run's folder."""

    def run_train(*flags: str, name: str = "run") -> Path:
        train.main(["--dataset", "digits", "--depth", "8", "--output", str(tmp_path), "--name", name, *flags])
        return tmp_path / name

    return run_train


@pytest.fixture
def refused(run, capsys):
    """Runs train.py with flags that it must refuse: exit code 2, one line on stderr, which is returned."""

    def run_refused(*flags: str, **kwargs: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*flags, **kwargs)
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.count("\n") == 1
        return message

    return run_refused


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
