import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import metrics, read_json, same, stop_at, without_times
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from utils import record
from utils.failures import run_script

SHORT = ("--train_size", "200", "--epochs", "3")  # two steps an epoch
LEARNS = ("--train_size", "400", "--batch_size", "16", "--epochs", "6", "--augment", "none")


def test_a_short_training_learns(run):
    folder = run(*LEARNS)
    rows, summary = metrics(folder), read_json(folder / "summary.json")
    assert summary["best_top1"] > 60  # chance is 10; seeds give 72 to 89
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]


def test_the_folder_explains_the_run(run):
    folder = run(*SHORT, "--method", "disout", "--dist_prob", "0.2", "--alpha", "1")
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {
        *("config.json", "metrics.csv", "summary.json", "curve.png", "best.pt"),
        *("checkpoint.pt", "checkpoint_previous.pt", ".lock"),
    }
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1

    config, summary, rows = read_json(folder / "config.json"), read_json(folder / "summary.json"), metrics(folder)
    assert (config["dist_prob"], config["alpha"], config["block_size"], config["train_size"]) == (0.2, 1, 6, 200)
    assert {"command", "torch", "device", "device_name", "commit"} <= set(config)
    assert tuple(rows[0]) == record.COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.02, 0.004])
    assert [row["dist_prob"] for row in rows] == pytest.approx([0.2 * step / 5 for step in (1, 3, 5)], abs=1e-6)
    best = max(rows, key=lambda row: row["test_top1"])
    assert summary["best_top1"] == pytest.approx(best["test_top1"], abs=1e-3)
    assert summary["best_epoch"] == best["epoch"]
    assert summary["last_top1"] == pytest.approx(rows[-1]["test_top1"], abs=1e-3)
    assert (summary["method"], summary["evaluated_on"], summary["parameters"]) == ("disout", "test", 77_850)


def test_distorted_shows_whether_the_regularizer_fires(run):
    for method, expected in (("none", 0), ("dropblock", 0.0761), ("disout", 0.0761)):
        folder = run("--train_size", "128", "--epochs", "2", "--method", method, name=method)
        assert read_json(folder / "summary.json")["distorted"] == pytest.approx(expected, abs=0.015)
    config = read_json(folder.parent / "none" / "config.json")
    assert [config[flag] for flag in ("dist_prob", "alpha", "block_size", "inside")] == [0, 0, 0, 0]
    assert read_json(folder.parent / "dropblock" / "config.json")["alpha"] == 0


@pytest.mark.parametrize(
    ("function", "call", "finished"),  # the last three: between two of the files that an epoch writes
    [
        ("train.evaluate", 3, 2),
        ("utils.record.save_weights", 1, 0),
        ("utils.checkpoint.Checkpoints.save", 2, 1),
        ("utils.record.write_metrics", 4, 3),
    ],
)
def test_resumed_equals_uninterrupted(run, monkeypatch, capsys, function, call, finished):
    whole = run(*SHORT, name="whole")
    stop_at(monkeypatch, function, call)
    with pytest.raises(KeyboardInterrupt):
        run(*SHORT, name="stopped")
    stopped = run(*SHORT, "--resume", name="stopped")
    assert f"going on after epoch {finished}" in capsys.readouterr().out or finished == 0
    assert without_times(metrics(stopped)) == without_times(metrics(whole))
    for name in ("checkpoint.pt", "best.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (stopped, whole)))
    assert all([step for step, _ in points] == [1, 2, 3] for points in shown(stopped).values())


def shown(folder):
    """What TensorBoard shows of a run: tag -> steps and wall times."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(point.step, point.wall_time) for point in events.Scalars(tag)] for tag in record.TAGS.values()}


def test_a_resumed_run_keeps_the_times_of_its_epochs_and_the_files_that_a_tensorboard_reads(run, monkeypatch):
    stop_at(monkeypatch, "train.evaluate", 3)
    with pytest.raises(KeyboardInterrupt):
        run(*SHORT)
    folder = run("--train_size", "8", "--epochs", "1", name="other").parent / "run"
    before, files = shown(folder), set(folder.glob("events.out.tfevents.*"))
    run(*SHORT, "--resume")
    after = shown(folder)
    assert files < set(folder.glob("events.out.tfevents.*"))
    for tag, points in after.items():
        assert points[:2] == before[tag] and [step for step, _ in points] == [1, 2, 3]


def test_a_run_that_goes_back_to_the_checkpoint_before_shows_each_epoch_once(run, monkeypatch):
    stop_at(monkeypatch, "train.evaluate", 3)
    with pytest.raises(KeyboardInterrupt):
        run(*SHORT)
    folder = run("--train_size", "8", "--epochs", "1", name="other").parent / "run"
    (folder / "checkpoint.pt").write_bytes(b"")
    run(*SHORT, "--resume")
    assert all([step for step, _ in points] == [1, 2, 3] for points in shown(folder).values())


def test_a_name_is_no_mathematics_and_a_missing_picture_is_drawn_later(run, monkeypatch, capsys):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "draw_curve", fail)
        run(*SHORT, name="a$^$b")
    folder = run(*SHORT, "--resume", name="a$^$b")
    assert "is complete" in capsys.readouterr().out
    assert (folder / "summary.json").exists() and (folder / "curve.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run):
    states = [
        torch.load(run(*SHORT, "--seed", seed, name=name) / "checkpoint.pt", weights_only=True)
        for seed, name in (("5", "first"), ("5", "again"), ("6", "other"))
    ]
    assert same(states[0], states[1])
    assert not same(states[0]["model"], states[2]["model"])


def test_resume_starts_afresh_where_there_is_nothing_and_passes_over_what_is_complete(run, capsys):
    folder = run(*SHORT, "--resume")
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    capsys.readouterr()
    run(*SHORT, "--resume", "--data_root", "elsewhere")
    assert '"best_top1"' in capsys.readouterr().out
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", ["none", "dropblock", "disout"])
def test_compiled_training_has_a_graph_a_batch_size_and_gives_the_same(run, graphs, method):
    """Batches of 128 images, the last of 72, the evaluation of 360 and, at the end, of the 200 training images."""
    compiled = run(*SHORT, "--method", method, "--compile", name="compiled")
    assert torch.are_deterministic_algorithms_enabled()  # or several threads may scatter in any order
    assert graphs.frame_count == 4
    assert read_json(compiled / "config.json")["compile"] is True
    eager = run(*SHORT, "--method", method, name="eager")
    for ours, theirs in zip(metrics(compiled), metrics(eager), strict=True):
        assert without_times([ours])[0] == pytest.approx(without_times([theirs])[0], rel=1e-3)


def test_compilation_that_fails_is_one_line(run, monkeypatch, capsys):
    def no_compiler(*_):
        raise RuntimeError("no compiler")

    compile_for_real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile_for_real(*args, backend=no_compiler, **kwargs)
    )
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda argv: run(*argv), [*SHORT, "--compile"])
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert message.count("\n") == 1 and "--compile" in message and "no compiler" in message


def test_a_signal_that_ends_the_compiler_too_stops_the_run(run, monkeypatch, capsys):
    def killed(*_):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("C++ compile error")

    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_for_real(*args, backend=killed, **kwargs))
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda argv: run(*argv), [*SHORT, "--compile"])
    assert stop.value.code == 130
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "stopped by SIGINT; the same command with --resume" in message


def test_amp_learns_in_bfloat16_and_keeps_float32(run):
    folder = run(*LEARNS, "--amp")
    assert read_json(folder / "summary.json")["best_top1"] > 60  # chance is 10
    assert read_json(folder / "config.json")["precision"] == "bfloat16 autocast"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    momenta = [state["momentum_buffer"] for state in state["optimizer"]["state"].values()]
    tensors = [tensor for tensor in [*state["model"].values(), *momenta] if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    losses = [
        metrics(run(*SHORT, *precision, name=f"short{len(precision)}"))[-1]["train_loss"]
        for precision in ((), ("--amp",))
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_threads_are_those_asked_for(run):
    before = torch.get_num_threads()
    try:
        folder = run(*SHORT, "--threads", "1")
        assert torch.get_num_threads() == read_json(folder / "config.json")["threads"] == 1
        run(*SHORT, "--threads", "2", "--resume")
    finally:
        torch.set_num_threads(before)


def test_an_existing_run_is_not_overwritten(run, refused):
    folder = run(*SHORT)
    before = (folder / "metrics.csv").read_bytes()
    assert "--resume" in refused(*SHORT)
    message = refused(*SHORT, "--resume", "--lr", "0.2", "--method", "dropblock", "--amp")
    assert "amp:" not in message  # a run may go on in another precision
    assert all(word in message for word in ("lr: 0.1 -> 0.2", "method: disout -> dropblock", "alpha: 5.0 -> 0.0"))
    assert (folder / "metrics.csv").read_bytes() == before


def test_evaluate_gives_the_recorded_accuracy(run, capsys, tmp_path):
    folder = run(*SHORT, "--holdout", "300", name="trained")
    summary = read_json(folder / "summary.json")
    assert summary["evaluated_on"] == "holdout"
    for name, key in (("best.pt", "best_top1"), ("checkpoint.pt", "last_top1")):
        capsys.readouterr()
        run(*SHORT, "--holdout", "300", "--evaluate", str(folder / name), name="none")
        assert f"top1 {summary[key]:.2f} %" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_what_goes_wrong_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    script = Path(train.__file__)
    command = [sys.executable, script, "--dataset", "digits", "--depth", "8", "--evaluate", tmp_path / "broken.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "broken.pt" in result.stderr


def test_an_error_without_text_is_one_line_too(capsys):
    def fail(_argv):
        raise OSError

    with pytest.raises(SystemExit) as stop:
        run_script("train.py", fail, [])
    assert (stop.value.code, capsys.readouterr().err) == (1, "train.py: OSError\n")
