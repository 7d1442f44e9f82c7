"""Prints how many cores this process may use: fewer than the machine has in a container, or under a scheduler."""

import os
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """By affinity (taskset, cpusets, SLURM) and by the quotas of the control group that it is in (Docker, Kubernetes),
    of which 1.5 cores count as 1; at least 1. `root` is that of the file system."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in quotas(root))]))


def quotas(root: Path) -> list[float]:
    """In cores, of the control group and those above it, versions 1 and 2."""
    found = []
    groups = root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = mount / group.lstrip("/")  # on the host; a container may see its own group as the mount itself
        for place in (folder, *folder.parents):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            if all((place / name).exists() for name in names):
                quota, period = " ".join((place / name).read_text(encoding="utf-8") for name in names).split()
                found += [int(quota) / int(period)] if quota not in ("max", "-1") else []
            if place == mount:
                break
    return found


if __name__ == "__main__":
    print(cores())
