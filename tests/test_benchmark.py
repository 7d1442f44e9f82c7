import importlib.util
import json
import math
import time
from pathlib import Path

import pytest

import train

SCRIPT = Path(train.__file__).parent / "scripts/benchmark.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The script, with one turn of everything and no training steps."""
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def once(calls, turns):
        times = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name] = [time.perf_counter() - start]
        return times

    monkeypatch.setattr(module, "interleave", once)
    monkeypatch.setattr(module, "training_steps", lambda *_: [])
    return module


def test_every_figure_is_printed_and_written(benchmark, photographs_folder, tmp_path, capsys):
    flags = ["--device", "cpu", "--eager", "--data", str(photographs_folder)]
    benchmark.main([*flags, "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    machine, *lines = capsys.readouterr().out.splitlines()
    assert written["machine"] == machine
    assert [row["what"] for row in written["rows"]] == [line.split("  ")[0] for line in lines]
    assert all(0 < row["median"] < math.inf for row in written["rows"])
    assert [row["median"] for row in written["rows"] if "bytes kept" in row["what"]] == pytest.approx([1, 1], abs=0.001)


def test_a_missed_target_is_said(benchmark, capsys):
    benchmark.report("a", [1.0, 2.0, 3.0], at_most=1.5)
    benchmark.report("b", [1.0, 2.0, 3.0], at_least=1.5)
    first, second = capsys.readouterr().out.splitlines()
    assert "at most 1.5: MISSED" in first and "at least 1.5: met" in second
