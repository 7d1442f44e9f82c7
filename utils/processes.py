"""One process, or the several that torchrun starts; and the workers of each."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

try:
    import resource
except ImportError:  # Windows
    resource = None

# What a launcher gives each process, all of it: schedulers leave some of these behind in an environment.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")


class Failure(Exception):
    """What ends a run with one line and this exit code. `of_all`: all processes have raised it, so the first one says
    it for them."""

    exit_code = 1
    of_all = False


def launched() -> tuple[int, int]:
    """This process's rank among those of its machine, and how many processes there are in all; (0, 1) unless a
    launcher such as torchrun has started several.

    Raises:
        ValueError: naming the variable of the environment that makes no sense.
    """
    if not all(os.environ.get(name) for name in LAUNCHED):
        return 0, 1
    found = {name: os.environ[name] for name in LAUNCHED[:-1]}
    for name, value in found.items():
        if not value.isdecimal():
            raise ValueError(f"{name} in the environment must be a whole number, not {value!r}")
    rank, local_rank, world, _ = map(int, found.values())
    if not max(rank, local_rank) < world:
        raise ValueError(f"RANK ({rank}) and LOCAL_RANK ({local_rank}) must be below WORLD_SIZE ({world})")
    return local_rank, world


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's device. What they say to each other
    goes through nccl between GPUs, else through gloo."""
    local_rank, world = launched()
    if world == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def allow_open_files() -> None:
    """As many as the system lets this process and its workers open, 65,536 at most; macOS takes no more than 10,240."""
    if not resource:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (65_536, 10_240):
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        if 0 <= soft < most:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                return


def end_workers() -> None:
    """Ends what is left of the loaders' workers, whatever ended their process. Left to themselves they would stay: at
    exit, multiprocessing sends each one SIGTERM, which they outlive, and waits for them."""
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # the loader's handler raises when a worker ends
            of_loader = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
            worker.join()
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, of_loader or signal.SIG_DFL)


def processes() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    return processes()[0] == 0


def summed(totals: Tensor) -> Tensor:
    """The sum of every process's `totals`."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals


def gathered(tensor: Tensor) -> Tensor:
    """Every process's tensor, in the order of their ranks, along a new first dimension."""
    parts = [torch.empty_like(tensor) for _ in range(processes()[1])]
    if len(parts) == 1:
        return tensor[None]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def largest(*numbers: int) -> list[int]:
    """Of each number the largest that any process has. On the CPU, so that no device is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    of_all = torch.tensor(numbers)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return of_all.tolist()


def gathered_objects(own: T) -> list[T]:
    """Every process's object, in the order of their ranks."""
    of_all = [own] * processes()[1]
    if len(of_all) > 1:
        dist.all_gather_object(of_all, own)
    return of_all


def first_does(act: Callable[[], T]) -> T | None:
    """What `act` returns in the first process, which alone calls it; in the others None.

    Raises:
        Failure, OSError: what it raised there, in all of them.
    """
    error, done = None, None
    try:
        done = act() if is_first() else None
    except (Failure, OSError) as raised:
        error = raised
    if error := from_first(error):
        error.of_all = True
        raise error
    return done


def from_first(own: T) -> T:
    """The first process's object, in all."""
    box = [own]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def share(tensors: Iterable[Tensor]) -> None:
    """Gives every process the first one's tensors."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def leave() -> None:
    if dist.is_initialized():
        # gloo's threads need the interpreter to let go of the last tensors, which whoever destroys the group, and waits
        # for these threads, does not give them (seen with torch 2.11).
        time.sleep(0.5)
        dist.destroy_process_group()
