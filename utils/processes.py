"""One process, or the several that torchrun starts."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's device. What they say to each other
    goes through nccl between GPUs, else through gloo."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


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


def share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's buffers (batch-norm statistics), so that all evaluate the same network."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
