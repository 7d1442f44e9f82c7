"""The batches of photographs, through workers: who gets which, what ends a worker, and what a worker's end means."""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from types import FrameType, TracebackType

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from utils.interruptions import AT_ONCE, heard
from utils.photographs import MEAN, STD, Photographs
from utils.processes import Failure
from utils.schedules import seed_for


class WorkerDied(Failure):
    """One of the loader's workers ended in the middle of its work."""

    def __init__(self) -> None:
        super().__init__(
            "a worker was killed, most likely for want of memory or of shared memory: fewer --workers need less; "
            "--resume goes on after the last checkpoint"
        )


class EpochSampler:
    """The keys of this process's batches in an epoch, which must be set before, as must the first step where it is not
    0: each step's images, in an order that is a function of (seed, epoch), go round the processes, and each process's
    in `accumulate_steps` batches."""

    def __init__(self, step_sizes: list[int], accumulate_steps: int, seed: int, rank: int, world: int) -> None:
        self.step_sizes, self.accumulate_steps, self.seed = step_sizes, accumulate_steps, seed
        self.rank, self.world = rank, world
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_for("epoch", self.seed, self.epoch))
        order = torch.randperm(sum(self.step_sizes), generator=generator)
        for images in order.split(self.step_sizes)[self.first_step :]:
            for part in images[self.rank :: self.world].tensor_split(self.accumulate_steps):
                yield [(self.epoch, index) for index in part.tolist()]

    def __len__(self) -> int:
        return (len(self.step_sizes) - self.first_step) * self.accumulate_steps


def test_keys(size: int, batch_size: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """Every image in exactly one process's batches, none twice."""
    keys = [(0, index) for index in range(rank, size, world)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def make_loader(photographs: Photographs, keys: EpochSampler | list, workers: int, device: torch.device) -> DataLoader:
    more = {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": outlive_signals} if workers else {}
    # A generator of its own: starting an iterator draws from it, which must not shift what a step draws.
    more |= {"generator": torch.Generator(), "pin_memory": device.type == "cuda"}
    return DataLoader(photographs, batch_sampler=keys, num_workers=workers, **more)


def outlive_signals(_worker: int) -> None:
    """A worker ends with its process, once that has saved (utils.processes.end_workers). A terminal and torchrun signal
    whole process groups, a scheduler all processes: a signal is left to the worker's process; the same one again ends
    the worker, unless it comes at once."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    for number in heard():
        signal.signal(number, let_pass)
    Queue._on_queue_feeder_error = hand_over_error
    sys.excepthook = end_without_files


def let_pass(number: int, _frame: FrameType | None) -> None:
    until = time.monotonic() + AT_ONCE
    signal.signal(number, lambda *_: os._exit(0) if time.monotonic() > until else None)


def hand_over_error(queue: Queue, _error: Exception, batch: tuple) -> None:
    """In the place of a batch that could not be handed over, for want of open files for one. Left to itself the queue
    prints the error, and the worker's process waits for the batch for ever."""
    queue.put((batch[0], ExceptionWrapper(where="in a worker")))


def end_without_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of the thread that hands over batches' memory, which would print this and try again for ever."""
    if getattr(error, "errno", None) == errno.EMFILE:
        os._exit(errno.EMFILE)
    sys.__excepthook__(kind, error, trace)


def on_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, normalised there: float32 (B, 3, H, W) in channels_last memory format, int64 (B,).

    Raises:
        ImageError: an image cannot be read.
        WorkerDied: a worker ended while it handed over a batch. Elsewhere the loader raises RuntimeError, wherever its
            process just is: see run_script.
    """
    mean, std = (255 * torch.tensor(values)[:, None, None].to(device, non_blocking=True) for values in (MEAN, STD))
    batches = iter(loader)
    while True:
        try:
            images, labels = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            time.sleep(1)  # in which the loader's handler raises what it knows of the worker's end, if it does
            raise WorkerDied() from error
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        yield (images.float() - mean) / std, labels.to(device, non_blocking=True)
