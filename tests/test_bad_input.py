"""What the user types wrong is one line on stderr that names the flag or the file, and exit code 2; what goes wrong the
same and exit code 1. Nothing is half-written, nor lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import read_json
from PIL import Image
from torch import nn

import train
import train_imagenet
from models.resnet_cifar import ResNet
from utils import engine, photographs
from utils.checkpoint import CheckpointError
from utils.failures import run_script
from utils.processes import LAUNCHED

MAIN = {"train.py": train.main, "train_imagenet.py": train_imagenet.main}
BOTH = tuple(MAIN)

# What flag, with what value; what the line must name beside them.
TYPED = [
    (BOTH, ("--dist_prob", "1.5"), ("at least 0 and at most 1",)),
    (BOTH, ("--dist_prob", "-0.1"), ()),
    (BOTH, ("--dist_prob", "much"), ("number",)),
    (BOTH, ("--dist_prob", "nan"), ()),
    (BOTH, ("--alpha", "-1"), ()),
    (BOTH, ("--alpha", "inf"), ()),
    (BOTH, ("--block_size", "0"), ()),
    (BOTH, ("--block_size", "2.5"), ("whole",)),
    (BOTH, ("--momentum", "1"), ("below 1",)),
    (BOTH, ("--lr", "0"), ("above 0",)),
    (BOTH, ("--lr", "nan"), ()),
    (BOTH, ("--weight_decay", "-1"), ()),
    (BOTH, ("--label_smoothing", "1"), ("below 1",)),
    (BOTH, ("--epochs", "0"), ()),
    (BOTH, ("--batch_size", "0"), ()),
    (BOTH, ("--batch_size", "1e3"), ("whole",)),
    (BOTH, ("--warmup_epochs", "-1"), ()),
    (BOTH, ("--seed", "-1"), ()),
    (BOTH, ("--seed", str(2**64)), ("at most",)),
    (BOTH, ("--threads", "0"), ("at least 1",)),
    (BOTH, ("--threads", "99999999999"), ("at most 1024",)),
    *(
        (BOTH, (flag, "9" * 30), ("at most",))
        for flag in ("--epochs", "--batch_size", "--block_size", "--warmup_epochs")
    ),
    (BOTH, ("--epochs", "9" * 5000), ("at least 1",)),
    (("train.py",), ("--train_size", "9" * 30), ("at most",)),
    (("train.py",), ("--depth", "9" * 5000), ("6n + 2",)),
    (("train.py",), ("--depth", "9" * 29 + "8"), ("6n + 2",)),
    (("train_imagenet.py",), ("--workers", "99999999999"), ("at most 1024",)),
    (("train_imagenet.py",), ("--accumulate_steps", "9" * 30), ("at most",)),
    (("train_imagenet.py",), ("--image_size", "1000000"), ("384,000 GB", "--batch_size")),
    (("train_imagenet.py",), ("--batch_size", "999999999"), ("GB", "--image_size")),
    (BOTH, ("--save_minutes", "0"), ("above 0",)),
    (BOTH, ("--method", "dropuot"), ("--method", "dropuot", "disout")),
    (BOTH, ("--device", "cuda:99"), ()),
    (BOTH, ("--device", "toaster"), ()),
    (BOTH, ("--device", "meta"), ()),
    (BOTH, ("--device", "privateuseone"), ()),
    (BOTH, ("--name", "a/b"), ()),
    *((BOTH, (flag, "\udcff"), ("UTF-8",)) for flag in ("--output", "--name", "--init", "--evaluate")),
    (BOTH, ("--output", "~nobody-here/runs"), ("home",)),
    (("train.py",), ("--data_root", "\udcff"), ("UTF-8",)),
    (("train_imagenet.py",), ("--data", "\udcff"), ("UTF-8",)),
    (BOTH, ("--epoch", "3"), ()),
    (BOTH, ("--droprate", "3"), ()),
    (BOTH, ("--evaluate", "nowhere.pt"), ()),
    (BOTH, ("--evaluate", "."), ()),
    (BOTH, ("--init", "nowhere.pt"), ()),
    (BOTH, ("--init", "."), ("best.pt",)),
    (BOTH, ("--init", __file__, "--evaluate", __file__), ("leave one out",)),
    (BOTH, ("--method", "dropout", "--compile"), ("anew",)),
    (("train.py",), ("--augment", "autoaugment"), ("standard",)),
    (("train.py",), ("--dataset", "mnist"), ("cifar100",)),
    (("train.py",), ("--train_size", "-1"), ()),
    (("train.py",), ("--train_size", "1000", "--holdout", "438"), ("--train_size", "1437")),
    (("train.py",), ("--holdout", "1437"), ()),
    (("train.py",), ("--depth", "55"), ("6n + 2",)),
    (("train_imagenet.py",), ("--workers", "-1"), ()),
    (("train_imagenet.py",), ("--image_size", "31"), ("at least 32",)),
    (("train_imagenet.py",), ("--accumulate_steps", "0"), ()),
    (("train_imagenet.py",), ("--batch_size", "1"), ("two images",)),
    (("train_imagenet.py",), ("--batch_size", "3", "--accumulate_steps", "2"), ("two images",)),
    (("train_imagenet.py",), ("--augment", "mixup"), ("autoaugment",)),
]


@pytest.fixture
def fails(tmp_path, photographs_folder, capsys):
    """Runs a script that must stop with this exit code and one line on stderr, which is returned."""

    def run_failing(script, flags, code):
        small = {
            "train.py": ["--dataset", "digits", "--depth", "8"],
            "train_imagenet.py": ["--data", str(photographs_folder), "--image_size", "32", "--workers", "0"],
        }
        small = [
            *small[script],
            "--epochs",
            "1",
            "--batch_size",
            "32",
            "--output",
            str(tmp_path / "results"),
            "--name",
            "run",
        ]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script, MAIN[script], [*small, *flags])
        message = capsys.readouterr().err
        assert stop.value.code == code
        assert (message.count("\n") == 1 and message.startswith(f"{script}: ")) or "usage" not in message
        assert "Traceback" not in message
        return message

    return run_failing


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [(script, flags, words) for scripts, flags, words in TYPED for script in scripts],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else value,
)
def test_a_wrong_flag_is_named_before_any_data_is_read(fails, monkeypatch, tmp_path, script, flags, words):
    for module in (train.data, photographs):
        monkeypatch.setattr(module, "load", lambda *_: pytest.fail("data was read"))
    message = fails(script, flags, 2)
    named = [flag for flag in flags if (flag.startswith("--") and flag != "--method") or flag in words]
    assert all(word in message for word in (*named, *words)), message
    assert not (tmp_path / "results").exists()


def test_a_home_folder_that_the_shell_leaves_to_the_script(run, monkeypatch, tmp_path):
    """As it does after =."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run("--epochs", "1", "--train_size", "16", "--output=~/runs", "--data_root=~/cifar")
    assert (tmp_path / "home/runs/run/summary.json").exists() and not Path("~").exists()
    assert read_json(tmp_path / "home/runs/run/config.json")["data_root"] == str(tmp_path / "home/cifar")
    run("--evaluate=~/runs/run/best.pt")


def cifar(root, change):
    """The folder of CIFAR-10's files as the download leaves it, but with nonsense in them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{index}" for index in range(1, 6))):
        (folder / name).write_bytes(b"nonsense")
    change(folder)
    return ("--dataset", "cifar10", "--data_root", str(root))


def images(root, good, change):
    shutil.copytree(good, root)
    change(root)
    return ("--data", str(root))


def weights(path, content):
    content(path)
    return ("--evaluate", str(path))


# Script, the flags for a folder and the good photographs, what the line must name.
WENT_WRONG = {
    "no CIFAR": ("train.py", lambda at, _: ("--dataset", "cifar10", "--data_root", str(at / "no")), "--data_root"),
    "empty folder of CIFAR": ("train.py", lambda at, _: cifar(at / "x", lambda f: shutil.rmtree(f)), "--data_root"),
    "CIFAR with a wrong MD5": ("train.py", lambda at, _: cifar(at / "x", lambda f: None), "cifar-10-batches-py"),
    "a file of CIFAR missing": (
        "train.py",
        lambda at, _: cifar(at / "x", lambda f: (f / "test_batch").unlink()),
        "cifar-10-batches-py",
    ),
    "no photographs": ("train_imagenet.py", lambda at, _: ("--data", str(at / "no")), "no/train"),
    "no val": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: shutil.rmtree(root / "val")),
        "x/val",
    ),
    "an empty train": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: [shutil.rmtree(c) for c in (root / "train").iterdir()]),
        "x/train",
    ),
    "a class without images": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: [f.unlink() for f in (root / "train/red").iterdir()]),
        "red",
    ),
    "other classes in val": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: (root / "val/red").rename(root / "val/green")),
        "same folders",
    ),
    "a photograph that is none": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: (root / "train/red/00.jpg").write_bytes(b"none")),
        "red/00.jpg",
    ),
    "a photograph cut short": (
        "train_imagenet.py",
        lambda at, good: images(at / "x", good, lambda root: os.truncate(root / "train/red/00.jpg", 900)),
        "red/00.jpg",
    ),
    "an empty file of weights": ("train.py", lambda at, _: weights(at / "w.pt", lambda p: p.touch()), "w.pt"),
    "weights of another network": (
        "train.py",
        lambda at, _: weights(at / "w.pt", lambda p: torch.save(nn.Linear(2, 2).state_dict(), p)),
        "w.pt",
    ),
    "weights of another shape": (
        "train_imagenet.py",
        lambda at, _: weights(at / "w.pt", lambda p: torch.save({"conv1.weight": torch.zeros(1)}, p)),
        "w.pt",
    ),
    "weights that are code": (
        "train_imagenet.py",
        lambda at, _: weights(at / "w.pt", lambda p: torch.save({"model": pytest.fail}, p)),
        "w.pt",
    ),
    "weights that are a picture": (
        "train.py",
        lambda at, _: weights(at / "w.png", lambda p: Image.new("RGB", (9, 9)).save(p)),
        "w.png",
    ),
    "weights that are a table": (
        "train.py",
        lambda at, _: weights(at / "metrics.csv", lambda p: p.write_text("epoch,lr\n")),
        "no torch file",
    ),
    "a config.json that is empty": (
        "train.py",
        lambda at, _: ((at / "run").mkdir(), (at / "run/config.json").touch(), ("--output", str(at), "--resume"))[-1],
        "run/config.json",
    ),
    "weights of another depth": (
        "train.py",
        lambda at, _: weights(at / "w.pt", lambda p: torch.save(ResNet(14).state_dict(), p)),
        "another depth",
    ),
    "output in a file": ("train.py", lambda at, _: ((at / "f").touch(), ("--output", str(at / "f")))[1], "f/run"),
    "a file for a folder": (
        "train.py",
        lambda at, _: ((at / "run").touch(), ("--output", str(at)))[1],
        "run",
    ),
}


@pytest.mark.parametrize("case", WENT_WRONG)
def test_what_goes_wrong_is_named_and_leaves_nothing_behind(fails, monkeypatch, tmp_path, photographs_folder, case):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    script, flags, word = WENT_WRONG[case]
    message = fails(script, flags(tmp_path, photographs_folder), 1)
    assert word in message and len(message) < 400
    assert not (tmp_path / "no").exists()
    left = [path.name for path in (tmp_path / "results").rglob("*") if path.is_file()]
    started = {".lock", "config.json", "metrics.csv"}  # of a run that --resume can go on with
    assert not left or {name for name in left if not name.startswith("events")} == started


@pytest.mark.parametrize("script", BOTH)
def test_too_little_memory_is_said_with_what_takes_less(fails, monkeypatch, script):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr(engine.F, "cross_entropy", fail)
    message = fails(script, (), 1)
    assert message == f"{script}: CUDA out of memory: --amp or a smaller --batch_size takes less memory\n"


def test_fewer_photographs_than_the_parts_of_a_batch_need(fails):
    message = fails("train_imagenet.py", ("--batch_size", "1024", "--accumulate_steps", "512"), 2)
    assert "two a part of a batch (512)" in message


def test_more_processes_than_gpus_are_counted(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in zip(LAUNCHED, ("2", "2", "4", "29500", "localhost"), strict=True):
        monkeypatch.setenv(name, value)
    assert "more processes than the 2 GPUs" in fails("train_imagenet.py", (), 2)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("number", [13, 28, 30])  # permission denied, no space, read-only
def test_an_output_folder_that_cannot_be_written_to_is_named(fails, monkeypatch, tmp_path, script, number):
    """Injected, as nothing stops root."""

    def fail(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", fail)
    message = fails(script, (), 1)
    assert os.strerror(number) in message and "run/config.json" in message
    assert [path.name for path in (tmp_path / "results/run").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", "{"])
def test_a_config_that_holds_no_settings_is_named(fails, tmp_path, content):
    folder = tmp_path / "results/run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    message = fails("train.py", ("--resume",), 1)
    assert "run/config.json cannot be read" in message and "remove it" in message


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None  # as on Windows
import runpy
script, *argv = sys.argv[1:]
sys.argv = [script, *argv]
runpy.run_path(script, run_name="__main__")
"""


def test_a_complete_run_whose_log_was_damaged_is_named_where_its_picture_is_missing(run):
    flags = ("--epochs", "1", "--train_size", "16", "--resume")
    folder = run(*flags)
    (folder / "curve.png").unlink()
    (folder / "metrics.csv").write_text("epoch\none\n")
    with pytest.raises(CheckpointError, match=r"run/metrics.csv cannot be read"):
        run(*flags)


@pytest.mark.parametrize("script", BOTH)
def test_without_fcntl_both_scripts_train_and_lock_their_folder(script, tmp_path, photographs_folder):
    flags = {
        "train.py": ["--dataset", "digits", "--depth", "8", "--train_size", "64"],
        "train_imagenet.py": ["--data", photographs_folder, "--image_size", "32", "--batch_size", "21"],
    }[script]
    path = Path(train.__file__).parent / script
    more = ["--epochs", "1", "--workers", "0"] if script == "train_imagenet.py" else ["--epochs", "1"]
    command = [sys.executable, "-c", WITHOUT_FCNTL, path, *flags, *more, "--output", tmp_path, "--name", "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()  # where there is no lock of the system, the file is the lock
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "another process is training" in refused.stderr
    (tmp_path / "run/.lock").unlink()
    trained = subprocess.run(command, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_a_name_that_follows_from_a_folder_whose_name_is_no_utf8(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        run_script("train_imagenet.py", train_imagenet.main, ["--data", "."])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (2, 1) and "argument --name: must be UTF-8" in message
    assert not list(folder.iterdir())
