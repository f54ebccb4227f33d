"""Free memory of the device and of the host."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from utils.control_groups import group_folders

UNLIMITED = 2**60  # for "no limit" cgroup v1 prints a number near 2^63


def free_memory() -> int:
    """Return the bytes that JAX may still allocate on its device (2^62 if unknown). On the CPU this is free host memory."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return free_host_memory()
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", 2**62) - statistics.get("bytes_in_use", 0)


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of free host memory, or less if a control group limits this process (in a container or a batch job):
    its own group, or any group that contains it.

    `root` is the folder that contains /proc and /sys.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *_left_in_groups(root)]))


NAMES = {  # by cgroup version: files with the limit and the use, and the entry of memory.stat with reclaimable memory
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left under each limit of the process's control groups."""
    for version, folder in group_folders("memory", root):
        left = _left_in_group(folder, *NAMES[version])
        if left is not None:
            yield left


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Return the bytes left under one group's limit, or None without a limit. Reclaimable file cache counts as free."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):  # no such group here, or its limit is "max"
        return None
    if most >= UNLIMITED:
        return None
    try:
        cached = re.search(rf"^{reclaimable} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        cached = None
    return most - taken + (int(cached[1]) if cached else 0)
