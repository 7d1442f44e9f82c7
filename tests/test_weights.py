"""Weights that other scripts wrote, and runs that start from the weights of another: --evaluate and --init."""

import re
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import metrics, read_json, same, stop_at, without_times
from torch import nn
from torch.optim.swa_utils import AveragedModel

import train_imagenet
from models.resnet_cifar import ResNet
from models.resnet_imagenet import ResNet50
from utils.checkpoint import load_weights, read
from utils.failures import run_script

SHORT = ("--train_size", "200", "--epochs", "2")


def compiled_group(model):
    model.layer1 = torch.compile(model.layer1)
    return model.state_dict()


# What a script saves of its network.
SAVED = {
    "a state dict": lambda model: model.state_dict(),
    "DataParallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),
    "compiled, then DataParallel": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    "DataParallel, then compiled": lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
    "one group compiled": compiled_group,
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "state_dict": lambda model: {"arch": "resnet", "state_dict": nn.DataParallel(model).state_dict(), "best": 93.9},
    "model and flags": lambda model: {"model": torch.compile(model).state_dict(), "args": Namespace(lr=0.1)},
    "net": lambda model: {"net": nn.DataParallel(model).state_dict(), "acc": 93.9, "epoch": 7},
    "model is its name": lambda model: {"model": "resnet", "state_dict": model.state_dict()},
    "one within the other": lambda model: {"model": {"state_dict": model.state_dict()}},
    "a module's attribute": lambda model: {"state_dict": nn.ModuleDict({"net": model}).state_dict()},
}


@pytest.mark.parametrize("saved", SAVED)
def test_weights_are_read_whatever_they_are_wrapped_in(saved, tmp_path):
    ours, theirs = ResNet(8), ResNet(8)
    expected = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    torch.save(SAVED[saved](theirs), tmp_path / "weights.pt")
    load_weights(tmp_path / "weights.pt", ours)
    assert same(dict(ours.state_dict()), expected)


def test_evaluate_reads_them(run, capsys, tmp_path):
    folder = run(*SHORT)
    weights = torch.load(folder / "best.pt", weights_only=True)
    torch.save({"state_dict": {f"module._orig_mod.{name}": weights[name] for name in weights}}, tmp_path / "wrapped.pt")
    capsys.readouterr()
    for path in (folder / "best.pt", tmp_path / "wrapped.pt"):
        run(*SHORT, "--evaluate", str(path))
    plain, wrapped = (line.split(": ")[1] for line in capsys.readouterr().out.splitlines())
    assert wrapped == plain


# A step changes nothing but the statistics of batch norm.
STILL = ("--train_size", "200", "--epochs", "1", "--lr", "1e-30", "--weight_decay", "0")


def weights_of(folder, name="checkpoint.pt"):
    state = torch.load(folder / name, weights_only=True)
    return {key: value for key, value in state.get("model", state).items() if key.endswith("weight")}


def test_init_starts_from_the_weights_of_a_file_and_says_so(run):
    first = run(*SHORT, name="first")
    second = run(*STILL, "--init", str(first / "checkpoint.pt"), name="second")
    torch.testing.assert_close(weights_of(second), weights_of(first), rtol=0, atol=1e-20)
    assert not same(weights_of(run(*STILL, name="third")), weights_of(first))
    assert read_json(second / "config.json")["init"] == str(first / "checkpoint.pt")
    assert read_json(first / "config.json")["init"] is None
    assert [row["lr"] for row in metrics(second)] == [1e-30]  # the schedules are its own


def test_init_starts_the_other_network_too(photographs_folder, tmp_path):
    torch.save(nn.DataParallel(ResNet50(2)).state_dict(), tmp_path / "weights.pt")
    small = ["--data", str(photographs_folder), "--image_size", "32", "--batch_size", "8", "--workers", "0"]
    small += ["--epochs", "1", "--lr", "1e-30", "--weight_decay", "0", "--output", str(tmp_path), "--name", "run"]
    train_imagenet.main([*small, "--init", str(tmp_path / "weights.pt")])
    expected = {name.removeprefix("module."): value for name, value in weights_of(tmp_path, "weights.pt").items()}
    torch.testing.assert_close(weights_of(tmp_path / "run"), expected, rtol=0, atol=1e-20)


def test_resumed_it_goes_on_from_its_own_checkpoint_and_the_file_may_be_gone(run, refused, monkeypatch, tmp_path):
    torch.save(ResNet(8).state_dict(), tmp_path / "weights.pt")
    flags = (*SHORT, "--init", str(tmp_path / "weights.pt"))
    whole = run(*flags, name="whole")
    stop_at(monkeypatch, "train.evaluate", 2)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, name="stopped")
    (tmp_path / "weights.pt").unlink()
    stopped = run(*flags, "--resume", name="stopped")
    assert without_times(metrics(stopped)) == without_times(metrics(whole))
    assert same(weights_of(stopped), weights_of(whole))
    assert "init: " in refused(*SHORT, "--resume", name="stopped")
    assert "weights.pt is no file" in refused(*flags, "--resume", name="another")


def test_a_longer_run_is_refused_with_why_and_what_to_do(run, refused):
    folder = run(*SHORT)
    message = refused("--train_size", "200", "--epochs", "4", "--resume")
    assert "epochs: 2 -> 4" in message and "schedules" in message
    assert f"--init {folder}/checkpoint.pt" in message and "another --name" in message
    assert "schedules" not in refused(*SHORT, "--seed", "1", "--resume")
    run("--train_size", "200", "--epochs", "4", "--init", f"{folder}/checkpoint.pt", name="longer")  # as it says


def test_a_file_of_another_network_leaves_no_folder(run, capsys, tmp_path):
    torch.save(ResNet(14).state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda argv: run(*argv), [*SHORT, "--init", str(tmp_path / "deeper.pt")])
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert message.count("\n") == 1 and "deeper.pt" in message and "another depth" in message
    assert not (tmp_path / "run").exists()
    run(*SHORT)


@pytest.mark.parametrize("version", [1, 2])
def test_weights_beside_what_numpy_computed_and_its_random_state(tmp_path, version):
    """As trainers save them; under the names that numpy 1 and numpy 2 give their own functions."""
    beside = {"top1": np.float64(93.5), "loss": np.float32(0.2), "epoch": np.int64(7), "best": np.bool_(True)}
    beside |= {"random": np.random.RandomState(0).get_state(), "per_class": np.ones((2, 3), np.float16)}
    torch.save({"state_dict": ResNet(8).state_dict(), **beside}, tmp_path / "theirs.pt")
    renamed, core = tmp_path / "renamed.pt", {1: b"numpy.core.", 2: b"numpy._core."}[version]
    with zipfile.ZipFile(tmp_path / "theirs.pt") as theirs, zipfile.ZipFile(renamed, "w") as file:
        for name in theirs.namelist():
            content = theirs.read(name)
            file.writestr(name, re.sub(rb"numpy\._?core\.", core, content) if name.endswith("data.pkl") else content)
    found = read(renamed)
    assert (found["top1"], found["epoch"], bool(found["best"])) == (93.5, 7, True)
    assert (found["random"][1] == np.random.RandomState(0).get_state()[1]).all()
    load_weights(renamed, ResNet(8))
