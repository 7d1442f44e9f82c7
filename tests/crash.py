"""Kills trainings with SIGKILL, resumes them, and compares what they end with to a training that was never stopped.

usage: python tests/crash.py [--script train.py | train_imagenet.py] [--times N]

Tiny trainings: digits with ResNet-8, or two gloo processes on generated photographs with ResNet-50. Each of the `times`
(default 20, or 5 of the two processes) is killed at random moments and in the middle of writing each of its files, and
resumed until it has finished. Then all weights, the optimizer's state, best.pt, metrics.csv (times aside) and the best
accuracy must be the same, byte for byte. A line each; exit code 1 where one differs.
"""

import csv
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
import train_imagenet
from utils.flags import Parser, number

FILES = ("best.pt", "checkpoint.pt", "metrics.csv", "summary.json")
AT_RANDOM = "at random"
Main = Callable[[list[str]], None]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--script", choices=("train.py", "train_imagenet.py"), default="train.py")
    parser.add_argument("--times", type=number(int, 1), help="default: 20, or 5 for train_imagenet.py")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that this process can fork
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.script == "train.py":
            script, processes, times = train.main, 1, args.times or 20
            flags = ["--dataset", "digits", "--depth", "8", "--epochs", "4", "--batch_size", "64"]
        else:
            script, processes, times = train_imagenet.main, 2, args.times or 5
            generate_photographs(folder / "photographs")
            flags = ["--data", str(folder / "photographs"), "--image_size", "32", "--epochs", "3", "--batch_size", "8"]
            flags += ["--lr", "0.01", "--workers", "1"]
        flags += ["--output", name, "--resume", "--save_minutes", "0.005", "--device", "cpu", "--threads", "1"]

        begin = time.monotonic()
        if not finished(start(script, [*flags, "--name", "whole"], processes, folder)):
            sys.exit(f"crash.py: the training fails:\n{(folder / 'output.txt').read_text()}")
        seconds = time.monotonic() - begin
        print(f"{args.script}, never killed: {seconds:.1f} s", flush=True)

        total, identical = Counter(), 0
        for index in range(times):
            run = folder / f"killed{index}"
            kills = train_and_kill(script, [*flags, "--name", run.name], processes, run, seconds, random.Random(index))
            different = differences(folder / "whole", run)
            identical += not different
            total += kills
            print(f"{index + 1}: {sum(kills.values())} kills, {', '.join(different) or 'identical'}", flush=True)
    moments = ", ".join(f"{count} {moment}" for moment, count in total.items())
    print(f"{identical} of {times} identical, after {sum(total.values())} kills: {moments}")
    sys.exit(identical < times)


def train_and_kill(
    main: Main, argv: list[str], processes: int, run: Path, seconds: float, draws: random.Random
) -> Counter:
    """Trains in `run` until it is complete; returns how often it was killed at what moment."""
    moments = [AT_RANDOM, AT_RANDOM, AT_RANDOM, *(f"writing {name}" for name in FILES[:-1])]
    draws.shuffle(moments)
    moments.insert(0, f"writing {FILES[-1]}")  # the last to be popped, as it is the last to be written
    kills = Counter()
    while not (run / "summary.json").exists():
        moment = moments.pop() if moments else None
        children = start(main, argv, processes, run.parent)
        end = time.monotonic() + (draws.uniform(0, seconds) if moment == AT_RANDOM else 10 * seconds + 60)
        while moment and time.monotonic() < end and running(children[0]):
            if moment != AT_RANDOM and (run / f"{moment.split()[1]}.partial").exists():
                break
        if moment and running(children[0]):
            kills[moment] += 1
            for child in children:
                os.kill(child, signal.SIGKILL)
        if not finished(children) and not moment:
            sys.exit(f"crash.py: {run.name} cannot go on:\n{(run.parent / 'output.txt').read_text()}")
    return kills


def start(main: Main, argv: list[str], processes: int, folder: Path) -> list[int]:
    """Calls main(argv) in child processes, which write to output.txt; returns their numbers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                os.environ.update(environment | {name: str(value) for name, value in ranks.items()})
            try:
                main(argv)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return children


def running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finished(children: list[int]) -> bool:
    """Waits; whether all have ended well."""
    return [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)


def differences(whole: Path, killed: Path) -> list[str]:
    """What the two runs did not end with alike."""
    different = [
        name
        for name in ("best.pt", "checkpoint.pt")
        if not same(*(torch.load(run / name, weights_only=True) for run in (whole, killed)))
    ]
    rows, summaries = [], []
    for run in (whole, killed):
        with (run / "metrics.csv").open() as file:
            rows.append([without_times(row) for row in csv.DictReader(file)])
        summaries.append(without_times(json.loads((run / "summary.json").read_text())))
    different += ["metrics.csv"] if rows[0] != rows[1] else []
    return different + (["summary.json"] if summaries[0] != summaries[1] else [])


def same(a: object, b: object) -> bool:
    """Bit for bit, through a checkpoint's dictionaries and lists, but for the times and the run's name."""
    if isinstance(a, dict):
        a, b = without_times(a), without_times(b)
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def without_times(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in ("seconds", "images_per_second")}


def generate_photographs(folder: Path) -> None:
    """Two classes, 21 to train on and 11 to evaluate on."""
    draws = random.Random(0)
    for index in range(32):
        image = Image.frombytes("RGB", (40, 40), draws.randbytes(4800))
        path = folder / ("train" if index < 21 else "val") / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


if __name__ == "__main__":
    main()
