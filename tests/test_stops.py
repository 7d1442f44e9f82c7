"""Signals, locks, checkpoints that are not good, and losses that are not finite."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics, read_json, same, without_times
from torch import nn

import train
from utils import engine, loader, record
from utils.checkpoint import CheckpointError, Checkpoints, Progress
from utils.data import locked
from utils.failures import run_script
from utils.files import InUse, fcntl, lock_folder
from utils.interruptions import Interruptions, Stopped

SHORT = ("--train_size", "200", "--batch_size", "32", "--epochs", "3")  # seven steps an epoch


@pytest.fixture
def interrupted(run, monkeypatch):
    """Runs train.py and lets `happen(step)` happen in each of its steps, counted from 0 in this process."""

    def run_interrupted(happen, *flags, name="stopped"):
        steps, seed_for = iter(range(10**6)), engine.seed_for

        def seed_and_happen(*purpose):
            happen(next(steps))
            return seed_for(*purpose)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "seed_for", seed_and_happen)
            return run(*SHORT, *flags, name=name)

    return run_interrupted


def signal_in(step, number):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138, signal.SIGUSR2: 140}


@pytest.fixture
def handlers():
    """Those of a process that nobody told to ignore anything, as a shell tells its background jobs, and nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: [signal.getsignal(number) for number in STOPS]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), STOPS.items())
def test_a_signal_saves_within_the_epoch_and_resume_is_exact(run, interrupted, capsys, handlers, number, code):
    whole = run(*SHORT, name="whole")
    before = handlers()
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda _: interrupted(signal_in(9, number)), [])
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--resume" in message and number.name in message
    assert handlers() == before
    stopped = whole.parent / "stopped"
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] == 10  # of 7 in an epoch

    seen = []
    interrupted(seen.append, "--resume")
    assert len(seen) == 21 - 10
    assert "going on after epoch 1 and 10 steps in all" in capsys.readouterr().out
    assert without_times(metrics(stopped)) == without_times(metrics(whole))
    for name in ("checkpoint.pt", "best.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (stopped, whole)))


def test_a_run_that_goes_on_elsewhere_says_where_it_was(run, interrupted, monkeypatch, tmp_path):
    with pytest.raises(Stopped):
        interrupted(signal_in(9, signal.SIGTERM))
    started = read_json(tmp_path / "stopped/config.json")
    monkeypatch.setattr(record, "device_name", lambda _device: "another machine")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    interrupted(lambda _step: None, "--resume")
    there = {
        "device_name": f"{started['device_name']}, then another machine",
        "threads": f"{started['threads']}, then 3",
    }
    assert read_json(tmp_path / "stopped/config.json") == started | there


def test_a_run_goes_on_in_another_precision_and_says_so(run, interrupted, monkeypatch, graphs, tmp_path):
    with pytest.raises(Stopped):
        interrupted(signal_in(9, signal.SIGTERM), "--amp", "--compile")
    started = read_json(tmp_path / "stopped/config.json")
    assert (started["precision"], started["compile"]) == ("bfloat16 autocast", True)
    monkeypatch.setattr(record, "git_commit", lambda: "newer")
    interrupted(lambda _step: None, "--resume")
    config = read_json(tmp_path / "stopped/config.json")
    assert config["precision"] == "bfloat16 autocast, then float32"
    assert (config["compile"], config["commit"]) == ("True, then False", f"{started['commit']}, then newer")
    assert len(metrics(tmp_path / "stopped")) == 3
    run(*SHORT, "--resume", name="stopped")  # complete: nothing is said again
    assert read_json(tmp_path / "stopped/config.json") == config


def test_a_flag_that_is_younger_than_the_run_had_its_default(run, interrupted, refused, capsys, tmp_path):
    with pytest.raises(Stopped):
        interrupted(signal_in(9, signal.SIGTERM), "--method", "none")
    config, checkpoint = tmp_path / "stopped/config.json", tmp_path / "stopped/checkpoint.pt"
    younger = ("augment", "holdout", "label_smoothing", "inside", "alpha")
    config.write_text(json.dumps({flag: of for flag, of in read_json(config).items() if flag not in younger}))
    state = torch.load(checkpoint, weights_only=True)
    for flag in younger:
        del state["settings"][flag]
    torch.save(state, checkpoint)

    again = ("--method", "none", "--resume")
    assert "augment: standard -> none" in refused(*SHORT, *again, "--augment", "none", name="stopped")
    interrupted(lambda _step: None, *again)
    assert "going on after epoch 1 and 10 steps" in capsys.readouterr().out
    assert (tmp_path / "stopped/summary.json").exists()


def test_a_repeated_signal_does_what_it_always_did_unless_it_comes_at_once(monkeypatch, handlers):
    """Another signal does not: a scheduler warns with SIGUSR1, and sends SIGTERM while the run still saves."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), Interruptions(10) as interruptions:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        for now[0], number in ((3.0, signal.SIGTERM), (6.0, signal.SIGINT), (7.0, signal.SIGINT)):
            signal.raise_signal(number)
            assert interruptions.noted == signal.SIGUSR1
        now[0] = 9.0
        signal.raise_signal(signal.SIGINT)


def test_what_a_parent_set_to_ignore_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    before = handlers()
    with Interruptions(10) as interruptions:
        signal.raise_signal(signal.SIGHUP)
        assert not interruptions.noted
        loader.outlive_signals(0)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert handlers() == before


def test_a_checkpoint_is_saved_within_an_epoch_when_its_minutes_are_over(run, interrupted, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *args: saved.append(args[-1].step) or save(*args))
    run(*SHORT, name="seldom")
    assert saved == [7, 14, 21]
    saved.clear()
    run(*SHORT, "--save_minutes", "1e-9", name="often")
    assert saved == list(range(1, 22))
    assert without_times(metrics(save_folder := run(*SHORT, "--resume", name="often"))) == without_times(
        metrics(save_folder.parent / "seldom")
    )


def test_interruptions_ask_for_a_save_when_the_minutes_are_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interruptions = Interruptions(2)
    asked = []
    for now[0] in (0, 119, 121, 239, 242):
        asked.append(interruptions.save_is_due())
        if asked[-1]:
            interruptions.after_saving()
    assert asked == [False, False, True, False, True]


class Counted(nn.Module):
    """Its only weight tells the checkpoints apart."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), float(value)))


@pytest.fixture
def checkpoints(tmp_path):
    """Of two epochs, of weights 1 and 2, in tmp_path; and the function that loads into a new network."""

    def load(settings):
        model = Counted(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        progress = Checkpoints(tmp_path, settings, {}).load(model, optimizer)
        return model.weight.item(), progress

    kept = Checkpoints(tmp_path, {"dataset": "digits", "threads": 1}, {})
    for epoch in (1, 2):
        model = Counted(epoch)
        kept.save(model, torch.optim.SGD(model.parameters(), lr=0.1), Progress(7 * epoch, ({"epoch": epoch},) * epoch))
    return kept, load


class Code:
    """What a malicious pickle does."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


BROKEN = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "empty": lambda path: path.write_bytes(b""),
    "no checkpoint": lambda path: path.write_bytes(b"no checkpoint at all"),
    "code": lambda path: torch.save({"model": Code()}, path),
    "of weights alone": lambda path: torch.save(Counted(5).state_dict(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "another network's": lambda path: torch.save(torch.load(path) | {"model": {"w": torch.ones(3)}}, path),
    "another data set's": lambda path: torch.save(torch.load(path) | {"settings": {"dataset": "cifar10"}}, path),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_checkpoint_gives_way_to_the_last_but_one_and_never_takes_its_place(checkpoints, tmp_path, capsys, how):
    kept, load = checkpoints
    assert load(kept.settings)[0] == 2
    BROKEN[how](kept.last)
    weight, progress = load(kept.settings)
    assert (weight, progress.step, len(progress.rows)) == (1, 7, 1)
    message = capsys.readouterr().out
    assert message.count("\n") == 1 and "checkpoint.pt" in message and "going on from checkpoint_previous.pt" in message
    assert not Path("executed").exists()

    # The next save replaces the bad one; the good one stays until there are two.
    again = Checkpoints(tmp_path, kept.settings, {})
    model = Counted(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    again.load(model, optimizer)
    again.save(Counted(3), optimizer, Progress(14))
    assert torch.load(kept.previous)["model"]["weight"] == 1
    assert load(kept.settings)[0] == 3


@pytest.mark.parametrize("how", BROKEN)
def test_where_none_is_good_it_says_what_is_wrong(checkpoints, how):
    kept, load = checkpoints
    for path in (kept.last, kept.previous):
        BROKEN[how](path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*--name") as error:
        load(kept.settings)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_settings_is_refused_but_not_one_of_other_places(checkpoints):
    _, load = checkpoints
    assert load({"dataset": "digits", "threads": 8})[0] == 2
    with pytest.raises(CheckpointError, match="dataset: digits -> cifar10"):
        load({"dataset": "cifar10"})


def test_without_the_last_the_last_but_one_serves(checkpoints):
    """A kill between its two renamings leaves it so."""
    kept, load = checkpoints
    kept.last.unlink()
    assert load(kept.settings)[0] == 1


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(run, interrupted, monkeypatch, capsys):
    folder = run(*SHORT, name="whole")

    def full(path, state):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(SystemExit) as stop:
        happen = lambda step: monkeypatch.setattr("utils.checkpoint.write", full) if step == 9 else None  # noqa: E731
        run_script("train.py", lambda _: interrupted(happen), [])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left" in message and "stopped/" in message
    monkeypatch.undo()
    stopped = folder.parent / "stopped"
    assert not list(stopped.glob("*.partial"))
    run(*SHORT, "--resume", name="stopped")
    assert without_times(metrics(stopped)) == without_times(metrics(folder))


@pytest.mark.parametrize("step", [4, 13])  # within an epoch, and in its last step
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(interrupted, monkeypatch, capsys, step):
    cross_entropy = engine.F.cross_entropy

    def happen(now):
        bad = float("nan") if now == step else 1.0
        monkeypatch.setattr(engine.F, "cross_entropy", lambda *args, **how: cross_entropy(*args, **how) * bad)

    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda _: interrupted(happen, "--save_minutes", "1e-9", "--dist_prob", "0.2"), [])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"loss is not finite in epoch {1 + step // 7}, step {1 + step % 7} of 7" in message
    assert f"lr {[0.0714286, 0.02][step // 7]:g}, dist_prob {0.2 * step / 20:g}" in message


def test_a_weight_that_is_not_finite_is_not_saved(run, interrupted, monkeypatch, capsys, tmp_path):
    step_of = torch.optim.SGD.step

    def happen(now):
        def step(optimizer, *args):
            step_of(optimizer, *args)
            if now == 13:
                optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

        monkeypatch.setattr(torch.optim.SGD, "step", step)

    with pytest.raises(SystemExit) as stop:
        run_script("train.py", lambda _: interrupted(happen), [])
    assert stop.value.code == 1
    assert "weight is not finite in epoch 2, step 7 of 7" in capsys.readouterr().err
    assert torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)["step"] == 7


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(train.__file__).parent)!r}); from pathlib import Path\n"
    code += f"from utils.files import lock_folder; lock = lock_folder(Path({str(tmp_path)!r}))\n"
    code += "print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(InUse, match="--name"):
        lock_folder(tmp_path)
    other.kill()  # leaves no lock
    other.wait()
    lock_folder(tmp_path).close()


def test_a_run_in_a_folder_that_is_in_use_is_one_line(run, refused, tmp_path):
    code = f"import fcntl, sys; file = open({str(tmp_path / 'run/.lock')!r}, 'a'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "print(flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another process is training" in refused(*SHORT)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        other.kill()
    run(*SHORT)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_trains_and_says_so_once(run, monkeypatch, capsys, number):
    """Nor can some of them flush a file to the disk."""

    def cannot(number):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        return fail

    for call in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, call, cannot(number))
    monkeypatch.setattr(os, "fsync", cannot(errno.EINVAL))
    folder = run(*SHORT)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and os.strerror(number) in message and "would not be noticed" in message
    assert (folder / "summary.json").exists()
    with locked(folder / "data"):
        assert (folder / "data").is_dir()


def test_the_stop_of_a_real_process_has_the_signals_exit_code(tmp_path):
    script = Path(train.__file__)
    flags = ["--dataset", "digits", "--depth", "8", "--epochs", "400", "--output", str(tmp_path), "--name", "run"]
    process = subprocess.Popen(
        [sys.executable, script, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()  # the first epoch
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert message.count("\n") == 1 and "--resume" in message
    assert (tmp_path / "run/checkpoint.pt").exists() and not (tmp_path / "run/summary.json").exists()
