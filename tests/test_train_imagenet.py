import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics, read_json, same, stop_at, without_times

import train_imagenet
from models.resnet_imagenet import ResNet50
from utils import loader, photographs
from utils.checkpoint import CheckpointError, load_weights
from utils.engine import evaluate
from utils.failures import run_script

SCRIPT = Path(train_imagenet.__file__)
finds_processes = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes to signal in /proc")


@pytest.fixture
def flags(photographs_folder, tmp_path):
    """A short training on the generated photographs, into tmp_path/NAME."""

    def short(name, *more):
        small = ["--image_size", "32", "--batch_size", "8", "--epochs", "4", "--lr", "0.005"]
        small += ["--workers", "0", "--device", "cpu"]
        return ["--data", str(photographs_folder), *small, "--output", str(tmp_path), "--name", name, *more]

    return short


def torchrun(flags, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", SCRIPT]
    return subprocess.Popen(
        [*command, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def signal_all(process):
    """Sends SIGTERM to the process and all that it started, as a scheduler does; returns these."""
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, started)):
        os.kill(pid, signal.SIGTERM)
    return started


def test_compiled_training_in_bfloat16_has_two_graphs(flags, graphs, tmp_path):
    """One for the training's batches and one for the evaluation's."""
    train_imagenet.main(flags("compiled", "--compile", "--amp", "--dist_prob", "0.1", "--batch_size", "21"))
    assert torch.are_deterministic_algorithms_enabled()
    assert graphs.frame_count == 2
    rows, config = metrics(tmp_path / "compiled"), read_json(tmp_path / "compiled/config.json")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert config["compile"] is True and config["precision"] == "bfloat16 autocast"


@finds_processes
def test_two_processes_learn_evaluate_each_image_once_and_resume_exactly(flags, photographs_folder, tmp_path):
    finished(torchrun(flags("whole")))
    rows, summary = metrics(tmp_path / "whole"), read_json(tmp_path / "whole/summary.json")
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert (summary["train_images"], summary["test_images"], summary["skipped"]) == (21, 11, 0)
    assert read_json(tmp_path / "whole/config.json")["processes"] == 2

    # The weights that the first process saved are those that both have evaluated.
    model = ResNet50(2)
    load_weights(tmp_path / "whole/checkpoint.pt", model)
    _, photos = photographs.load(photographs_folder, "none", 32, 0, False)
    batches = loader.make_loader(photos, loader.test_keys(11, 4, 0, 1), 0, torch.device("cpu"))
    scores = evaluate(model, loader.on_device(batches, torch.device("cpu")))
    assert scores["test_loss"] == pytest.approx(rows[-1]["test_loss"], rel=1e-4)

    process = torchrun(flags("stopped"))
    while process.poll() is None and not (tmp_path / "stopped/checkpoint.pt").exists():
        time.sleep(0.05)
    signal_all(process)  # torchrun too ends its processes, wherever they are
    assert "stopped by SIGTERM" in process.communicate()[0]
    assert "going on after epoch" in finished(torchrun(flags("stopped", "--resume")))
    assert without_times(metrics(tmp_path / "stopped")) == without_times(rows)
    checkpoints = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped"))
    assert same(*checkpoints)


def test_evaluate_is_the_same_in_one_process_and_in_two(flags, tmp_path, capsys):
    train_imagenet.main(flags("one", "--epochs", "1"))
    capsys.readouterr()
    arguments = flags("none", "--evaluate", str(tmp_path / "one/best.pt"))
    train_imagenet.main(arguments)
    line = capsys.readouterr().out
    assert f"top1 {read_json(tmp_path / 'one/summary.json')['best_top1']:.2f} %" in line
    assert line in finished(torchrun(arguments))


@finds_processes
def test_a_signal_to_every_process_stops_as_one_to_the_first(flags, tmp_path):
    """As from a scheduler: the workers must outlive what their process has only noted."""
    command = [sys.executable, SCRIPT, *flags("stopped", "--epochs", "400", "--workers", "2")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first epoch: all workers live
    workers = signal_all(process)
    assert len(workers) >= 2
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert message.count("\n") == 1 and "--resume" in message
    assert (tmp_path / "stopped/checkpoint.pt").exists()
    assert not any(Path("/proc", pid).exists() for pid in workers)


def test_accumulated_parts_make_the_same_steps(flags, tmp_path):
    train_imagenet.main(flags("parts", "--accumulate_steps", "2", "--epochs", "1"))
    assert [row["lr"] for row in metrics(tmp_path / "parts")] == [0.005]
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 3


def test_a_broken_image_is_one_line_or_counted(flags, photographs_folder, tmp_path, capsys):
    broken = shutil.copytree(photographs_folder, tmp_path / "broken")
    (broken / "val/blue/01.jpg").write_bytes(b"no image")
    arguments = flags("run", "--epochs", "1", "--data", str(broken), "--workers", "1")
    with pytest.raises(SystemExit) as stop:
        run_script("train_imagenet.py", train_imagenet.main, arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert message.count("\n") == 1 and "blue/01.jpg" in message and "--skip_corrupt" in message
    assert (tmp_path / "run/config.json").exists()
    train_imagenet.main([*arguments, "--resume", "--skip_corrupt"])  # as the message says
    summary = read_json(tmp_path / "run/summary.json")
    assert (summary["test_images"], summary["skipped"]) == (10, 1)
    assert "1 image could not be read" in capsys.readouterr().out


def test_a_folder_without_an_image_that_can_be_read_is_one_line(flags, photographs_folder, tmp_path, capsys):
    broken = shutil.copytree(photographs_folder, tmp_path / "broken")
    for image in broken.glob("val/*/*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        arguments = flags("run", "--epochs", "1", "--data", str(broken), "--skip_corrupt")
        run_script("train_imagenet.py", train_imagenet.main, arguments)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "train_imagenet.py: none of the images to evaluate on can be read\n"


def test_a_run_goes_on_with_the_images_that_it_began_with_alone(
    flags, photographs_folder, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(photographs_folder, tmp_path / "photographs")
    arguments = flags("run", "--epochs", "2", "--data", str(folder), "--resume")
    stop_at(monkeypatch, "utils.engine.seed_for", 5)  # of three steps an epoch
    with pytest.raises(KeyboardInterrupt):
        train_imagenet.main(arguments)
    checkpoint = tmp_path / "run/checkpoint.pt"
    before = checkpoint.read_bytes()

    def refused():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script("train_imagenet.py", train_imagenet.main, arguments)
        message = capsys.readouterr().err
        assert (stop.value.code, message.count("\n"), checkpoint.read_bytes() == before) == (1, 1, True)
        return message

    shutil.copy(folder / "train/red/00.jpg", folder / "train/red/99.jpg")
    assert "other images (train/: 21, now 22): put them back, or give another --name, with --init" in refused()
    (folder / "train/red/00.jpg").unlink()
    (folder / "val/blue/01.jpg").unlink()
    assert "(train/: 21, now 21 of other names, val/: 11, now 10)" in refused()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(photographs_folder)
    torch.save(torch.load(checkpoint) | {"images": {}}, tmp_path / "older.pt")
    train_imagenet.main([*arguments, "--data", str(elsewhere)])
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]

    (tmp_path / "older.pt").rename(checkpoint)  # of a run that had no list
    (tmp_path / "run/summary.json").unlink()
    train_imagenet.main(arguments)


def test_evaluate_needs_the_images_to_evaluate_on_alone(flags, photographs_folder, tmp_path, capsys):
    torch.save(ResNet50(2).state_dict(), tmp_path / "two.pt")
    torch.save(ResNet50(3).state_dict(), tmp_path / "three.pt")
    shutil.copytree(photographs_folder / "val", tmp_path / "alone/val")
    lines = []
    for folder in (photographs_folder, tmp_path / "alone"):
        train_imagenet.main(flags("run", "--evaluate", str(tmp_path / "two.pt"), "--data", str(folder)))
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and "top1" in lines[0]
    with pytest.raises(CheckpointError, match="other classes"):
        train_imagenet.main(flags("run", "--evaluate", str(tmp_path / "three.pt"), "--data", str(folder)))


def test_an_image_that_vanishes_is_named_and_no_dead_worker(flags, photographs_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(photographs_folder, tmp_path / "photographs")
    load = photographs.load

    def load_and_remove(*args):
        parts = load(*args)
        (folder / "train/red/06.jpg").unlink()
        return parts

    monkeypatch.setattr(photographs, "load", load_and_remove)
    with pytest.raises(SystemExit) as stop:
        arguments = flags("run", "--data", str(folder), "--workers", "1", "--skip_corrupt")
        run_script("train_imagenet.py", train_imagenet.main, arguments)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f"train_imagenet.py: {folder}/train/red/06.jpg cannot be read (No such file or directory): "
        "--resume goes on when it can\n"
    )
