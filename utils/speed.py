"""What makes every step faster, whatever it computes."""

import ctypes
import os
import sys

import torch
import torch._inductor.config

# Of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def set_up(threads: int | None, deterministic: bool, compiled_for_cpu: bool) -> None:
    """`threads` for operations on the CPU (None: torch's choice), cuDNN's fastest algorithm for each shape, or only
    algorithms that give the same bits again, and memory that is used again."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    # On a CPU, what is compiled scatters with all threads at once, in any order, unless told not to.
    torch.use_deterministic_algorithms(deterministic or compiled_for_cpu)
    torch.utils.deterministic.fill_uninitialized_memory = False  # that is for finding bugs
    # A compiled network draws torch's own random numbers: as eager runs do, and on a CPU faster than one at a time.
    torch._inductor.config.fallback_random = True
    keep_freed_memory()


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system as soon as they are freed, and takes them back, page by page, in the
    next step, which allocates the same. This keeps them; where there is no glibc it does nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
