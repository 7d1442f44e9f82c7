"""What two machines, each with files of its own, do with one run: train_imagenet.py in two processes."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import metrics, same, without_times

import train_imagenet
from models.resnet_imagenet import ResNet50
from utils.agreement import Seen, of_the_run, why_not
from utils.failures import run_script
from utils.processes import leave

SCRIPT = Path(train_imagenet.__file__)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def work(rank, tasks, results):
    """Runs the script with each of the flags that come, as one of two processes."""
    torch.set_num_threads(1)
    while task := tasks.get():
        port, flags = task
        names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_script("train_imagenet.py", train_imagenet.main, flags)
            except SystemExit as stop:
                code = stop.code
        leave()
        results.put((code, out.getvalue(), err.getvalue()))


@pytest.fixture(scope="module")
def pair():
    """Runs the script in two processes that live on, each with flags of its own; what each of them answered."""
    context = mp.get_context("spawn")
    ends = [(context.Queue(), context.Queue()) for _ in range(2)]
    children = [context.Process(target=work, args=(rank, *ends[rank]), daemon=True) for rank in range(2)]
    for child in children:
        child.start()

    def run(*flags_of_each):
        port = free_port()
        for (tasks, _), flags in zip(ends, flags_of_each, strict=True):
            tasks.put((port, flags))
        return [results.get(timeout=240) for _, results in ends]

    yield run
    for tasks, _ in ends:
        tasks.put(None)


@pytest.fixture
def machines(photographs_folder, tmp_path):
    """Two folders, a machine's each, with copies of the photographs; `flags(*more)` are a short training's on both."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(photographs_folder, folder / "photographs")

    def flags(*more):
        small = ["--image_size", "32", "--batch_size", "8", "--epochs", "2", "--lr", "0.005"]
        small += ["--workers", "0", "--device", "cpu"]
        return [
            ["--data", f"{folder}/photographs", *small, "--output", f"{folder}/results", "--name", "run", *more]
            for folder in folders
        ]

    return folders, flags


def refused(answers, code=2):
    """The line that the first process alone says, when both end with this exit code."""
    assert [answer[0] for answer in answers] == [code, code], answers
    first, second = (answer[2] for answer in answers)
    assert second == "" and first.count("\n") == 1 and first.startswith("train_imagenet.py: "), answers
    return first


def test_an_image_less_on_one_machine_is_refused(pair, machines):
    (first, second), flags = machines
    (second / "photographs/val/blue/01.jpg").unlink()
    line = refused(pair(*flags()))
    assert "val/ has 11 images on" in line and "(process 0) and 10 on" in line and "(process 1)" in line
    assert not (first / "results").exists()
    torch.save(ResNet50(2).state_dict(), first / "weights.pt")
    assert "val/ has 11 images on" in refused(pair(*flags("--evaluate", f"{first}/weights.pt")))
    (second / "photographs/val/blue/99.jpg").write_bytes((second / "photographs/val/blue/03.jpg").read_bytes())
    assert "and 11 of other names on" in refused(pair(*flags()))
    shutil.rmtree(second / "photographs/val/blue")
    assert "(process 1): " in (line := refused(pair(*flags()), code=1)) and "same folders of classes" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0.5"], "--lr is 0.005 on"),
        (["--amp"], "--amp is False on"),
        (["--resume"], "--resume is False on"),
        (["--seed", "3"], "--seed is 0 on"),
        (["--name", "other"], "--name is run on"),
        (["--init", "weights.pt"], "--init is not given on"),
        (["--evaluate", "weights.pt"], "--evaluate is not given on"),
    ],
)
def test_other_flags_on_one_machine_are_refused(pair, machines, more, said):
    (first, _), flags = machines
    ours, theirs = flags()
    line = refused(pair(ours, [*theirs, *more]))
    assert said in line and "(process 0) and " in line and not (first / "results").exists()


@pytest.mark.parametrize("flag", ["--init", "--evaluate"])
def test_a_file_that_the_first_process_alone_is_given_is_refused(pair, machines, flag):
    (first, _), flags = machines
    torch.save(ResNet50(2).state_dict(), first / "weights.pt")
    ours, theirs = flags()
    line = refused(pair([*ours, flag, f"{first}/weights.pt"], theirs))
    assert f"{flag} is given on" in line and "and not given on" in line and not (first / "results").exists()


def test_one_device_type_for_all_and_evaluation_of_a_run_that_another_has():
    flags = {"resume": True, "evaluate": None, "init": None, "device": torch.device("cpu"), "workers": 8}
    seen = [Seen("a", of_the_run(flags), False, {}, None)]
    assert why_not([seen[0], seen[0]._replace(flags=of_the_run(flags | {"workers": 2}))], Path("run")) is None
    other = of_the_run(flags | {"device": torch.device("cuda:1")})
    assert "--device is cpu on" in str(why_not([seen[0], seen[0]._replace(flags=other)], Path("run")))
    older = {flag: value for flag, value in of_the_run(flags).items() if flag != "resume"}
    assert "--resume is True on a (process 0) and None on" in str(
        why_not([seen[0], seen[0]._replace(flags=older)], Path("run"))
    )


def test_no_image_that_any_process_can_read_is_said_once(pair, machines):
    folders, flags = machines
    for folder in folders:
        for image in folder.glob("photographs/val/*/*.jpg"):
            image.write_bytes(b"no image")
    assert "none of the images to evaluate on" in refused(pair(*flags("--skip_corrupt", "--epochs", "1")), code=1)


def test_evaluation_is_of_the_first_ones_weights(pair, machines):
    (first, second), flags = machines
    for seed, folder in enumerate((first, second)):
        torch.manual_seed(seed)
        torch.save(ResNet50(2).state_dict(), folder / "weights.pt")
    ours, theirs = flags()
    lines = []
    for files in ((first, first), (first, second), (first, Path("/nowhere"))):
        answers = pair(
            *([*own, "--evaluate", f"{file}/weights.pt"] for own, file in zip((ours, theirs), files, strict=True))
        )
        assert [answer[0] for answer in answers] == [0, 0] and answers[1][1] == ""
        lines.append(answers[0][1])
    assert len(set(lines)) == 1 and "top1" in lines[0]
    (first / "weights.pt").write_bytes(b"no weights")
    assert "no torch file" in refused(pair(*flags("--evaluate", f"{first}/weights.pt")), code=1)
    torch.save(ResNet50(2).state_dict(), first / "weights.pt")
    (second / "results/run").mkdir(parents=True)
    (second / "results/run/checkpoint.pt").touch()  # which an evaluation does not read
    assert pair(*flags("--evaluate", f"{first}/weights.pt", "--resume"))[0][0] == 0


def test_a_run_is_where_its_first_process_is(pair, machines):
    """Complete, and of other settings, as that one says; a checkpoint that another one has is not left behind."""
    (first, second), flags = machines
    assert [answer[0] for answer in pair(*flags())] == [0, 0]
    assert not (second / "results").exists()
    shutil.rmtree(second / "photographs")  # which a complete run does not look at
    (code, said, _), other = pair(*flags("--resume"))
    assert code == 0 and "is complete" in said and other == (0, "", "")
    shutil.copytree(first / "photographs", second / "photographs")
    assert "epochs: 2 -> 3" in refused(pair(*flags("--epochs", "3", "--resume")))
    assert "holds a run already" in refused(pair(*flags()))

    (first / "results").rename(second / "results")
    line = refused(pair(*flags("--resume")))
    assert "the checkpoint of" in line and "lies on" in line and "(process 1), not on" in line
    assert "--output" in line and "--node_rank 0" in line
    assert not (first / "results").exists()


def test_two_agents_stop_and_go_on_with_the_bits_of_a_run_without_a_stop(machines):
    (first, second), flags = machines

    def start(*more):
        rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=localhost", f"--master_port={free_port()}"]
        return [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node_rank={rank}", SCRIPT, *own],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, own in enumerate(flags(*more))
        ]

    def answers(agents, code=0):
        said = [agent.communicate(timeout=300)[0] for agent in agents]
        assert all((agent.returncode == 0) == (code == 0) for agent in agents), said
        return said

    answers(start("--name", "whole"))
    agents = start("--name", "stopped", "--save_minutes", "1e-9")
    checkpoint = first / "results/stopped/checkpoint.pt"
    while not checkpoint.exists() and agents[0].poll() is None:
        time.sleep(0.02)
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in answers(agents, code=1)[0]
    assert torch.load(checkpoint)["step"] < 6  # of two epochs
    assert "going on after" in answers(start("--name", "stopped", "--resume"))[0]
    assert without_times(metrics(first / "results/stopped")) == without_times(metrics(first / "results/whole"))
    assert same(*(torch.load(first / f"results/{name}/checkpoint.pt") for name in ("whole", "stopped")))
    assert not (second / "results").exists()
