"""train_imagenet.py as a process of its own, with workers: whatever ends it, it ends, and nothing is left of it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_imagenet
from utils import loader
from utils.failures import run_script

SCRIPT = Path(train_imagenet.__file__)
ENDS = 60  # seconds, on a busy machine: what hangs, hangs for ever
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")


@pytest.fixture
def start(photographs_folder, tmp_path):
    """Starts a training, or with `command` another program that gets its flags."""
    started = []

    def start_process(*flags, data=photographs_folder, command=(sys.executable, SCRIPT)):
        small = ["--image_size", "32", "--batch_size", "8", "--epochs", "400", "--device", "cpu", "--threads", "1"]
        process = subprocess.Popen(
            [*command, "--data", data, *small, "--output", tmp_path, "--name", "run", *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_process
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def children(pid):
    """Those that decode: of a process, not the helper that multiprocessing starts."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"train_imagenet" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pids):
    """Those that are there and no zombies."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [path for path in states if path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"]


def ended(process, code=1):
    """What a process said when it ended, with this exit code."""
    _, message = process.communicate(timeout=ENDS)
    assert process.returncode == code, message
    return message


@pytest.mark.parametrize(("part", "workers"), [("train", "2"), ("val", "1")])
def test_a_broken_image_ends_it(start, photographs_folder, tmp_path, part, workers):
    broken = shutil.copytree(photographs_folder, tmp_path / "broken")
    (broken / part / "blue/01.jpg").write_bytes(b"no image")
    message = ended(start("--workers", workers, data=broken))
    assert message.count("\n") == 1 and "blue/01.jpg cannot be read" in message and "--skip_corrupt" in message


@pytest.mark.parametrize(("flags", "killed"), [((), signal.SIGKILL), (("--save_minutes", "1e-9"), signal.SIGBUS)])
def test_a_killed_worker_ends_it_and_the_last_checkpoint_is_whole(start, tmp_path, flags, killed):
    """In training, in evaluation, or, as it hardly does anything else with these minutes, while it saves."""
    process = start("--workers", "2", *flags)
    process.stdout.readline()  # the first epoch: all workers live
    workers = children(process.pid)
    assert len(workers) == 4  # two that decode for the training, two for the evaluation
    os.kill(workers[0], killed)
    lines = ended(process).splitlines()
    assert "a worker was killed" in lines[-1] and "--workers" in lines[-1] and "--resume" in lines[-1]
    # the worker itself may say that it had a bus error
    assert [line for line in lines[:-1] if "bus error" not in line] == []
    assert not alive(workers)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] >= 3
    assert not list(tmp_path.glob("run/*.partial"))


def test_a_worker_killed_in_one_of_two_processes_ends_both(start):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    process = start("--workers", "1", command=torchrun)
    process.stdout.readline()
    ranks = children(process.pid)
    workers = [children(rank) for rank in ranks]
    os.kill(workers[1][0], signal.SIGKILL)
    message = ended(process)
    assert "a worker was killed" in message
    assert not alive([*ranks, *workers[0], *workers[1]])
    assert message.count("Traceback") == 1  # torchrun's own


def test_an_interrupt_ends_it(start):
    process = start("--workers", "2")
    process.stdout.readline()
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGINT)
    assert "--resume" in ended(process, 130)
    assert not alive(workers)


def test_a_scheduler_warns_all_processes_and_then_ends_them(start, tmp_path):
    process = start("--workers", "2")
    process.stdout.readline()
    everyone = [*children(process.pid), process.pid]
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        for pid in everyone:
            os.kill(pid, number)
    message = ended(process, 138)
    assert message.count("\n") == 1 and "SIGUSR1" in message and "--resume" in message
    assert not alive(everyone)
    assert (tmp_path / "run/checkpoint.pt").exists()


LIMITED = """
import resource, runpy, sys
soft, hard, script, *argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
sys.argv = [script, *argv]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(("limit", "workers"), [(16, "2"), (24, "2"), (40, "8")])
def test_too_few_open_files_are_one_line_and_leave_no_process(start, tmp_path, limit, workers):
    flags = ("--workers", workers, "--epochs", "2", "--batch_size", "2", "--lr", "0.001")
    limited = [sys.executable, "-W", "ignore", "-c", LIMITED, str(limit), str(limit), SCRIPT]
    process = start(*flags, command=limited)
    assert "too many open files" in (message := ended(process)) and message.count("\n") == 1
    assert "`ulimit -n`" in message and "fewer --workers" in message
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in commands


def test_as_many_open_files_as_the_system_allows(start, tmp_path):
    limited = [sys.executable, "-W", "ignore", "-c", LIMITED, "16", "512", SCRIPT]
    ended(start("--workers", "2", "--epochs", "1", command=limited), code=0)
    assert (tmp_path / "run/summary.json").exists()


BREAK = {  # what hands over a batch, and what hands over its memory
    "batch": """
import multiprocessing.reduction as r
def fail(_):
    raise OSError(5, "Input/output error")
r.DupFd = fail
""",
    "memory": """
import multiprocessing.resource_sharer as r
def fail(_):
    try:
        raise OSError(24, "no file")
    except OSError:
        sys.excepthook(*sys.exc_info())
r._ResourceSharer._serve = fail
""",
}


@pytest.mark.parametrize(("what", "line"), [("batch", "[Errno 5] Input/output error"), ("memory", "too many")])
def test_a_batch_that_a_worker_cannot_hand_over_ends_it(start, what, line):
    broken = "import runpy, sys; sys.argv.pop(0)\n" + BREAK[what]
    broken += "\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    message = ended(start("--workers", "1", command=[sys.executable, "-c", broken, SCRIPT]))
    assert message.startswith(f"train_imagenet.py: {line}") and message.count("\n") == 1


def test_too_little_shared_memory_is_one_line(capsys):
    def fail(_argv):
        raise RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file: shared memory(shm)"
        )

    with pytest.raises(SystemExit) as stop:
        run_script("train_imagenet.py", fail, [])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1 and "shared memory: fewer --workers" in message


def test_a_batch_that_its_worker_could_not_hand_over(photographs_folder):
    """The worker died between saying that the batch is ready and handing it over."""

    class Loader:
        def __iter__(self):
            yield torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1)
            raise ConnectionRefusedError(111, "Connection refused")

    batches = loader.on_device(Loader(), torch.device("cpu"))
    next(batches)
    with pytest.raises(loader.WorkerDied):
        next(batches)
