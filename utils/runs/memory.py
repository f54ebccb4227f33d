"""How much memory there is."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax

UNLIMITED = 2**60  # cgroup v1 says so with a number near 2^63


def free_memory() -> int:
    """Bytes that JAX may still allocate on its device, as far as that says: the host's memory where it is the CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return free_host_memory()
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", 2**62) - statistics.get("bytes_in_use", 0)


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that are free, or fewer where a control group sets a limit (a container, a batch system's
    job): its own, or that of any group that it is in.

    `root` is where /proc and /sys are.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of the process's control groups leave, from its own group up to the topmost that can be seen.

    Both versions of the kernel's interface; see the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts, names = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts, names = ("sys/fs/cgroup/memory",), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # in a container the path may be the host's, of which only the end, or nothing, is mounted here; the rest is skipped
        group = Path(os.path.normpath("/" + path.lstrip("/")))
        for mount in mounts:
            for folder in (group, *group.parents):
                left = _left_in_group(root / mount / folder.relative_to("/"), *names)
                if left is not None:
                    yield left


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """What one group's limit leaves; None where it sets none. Files that it has read are given up when memory is short."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):  # there is no such group here, or its limit is "max"
        return None
    if most >= UNLIMITED:
        return None
    try:
        cached = re.search(rf"^{reclaimable} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        cached = None
    return most - taken + (int(cached[1]) if cached else 0)
