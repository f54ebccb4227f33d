"""The control groups of this process: limits of a container or a batch job. Reads cgroup v1 and v2.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/memory.rst, and scheduler/sched-bwc.rst.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the cgroup version (1 or 2) and the folder of each control group that limits this process: its own group, and all
    groups that contain it, up to the topmost visible one. Some folders may not exist.

    Args:
        controller: of version 1, such as memory or cpu.
        root: the folder that contains /proc and /sys.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            version, mounts = 2, ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif controller in controllers.split(","):  # mounted under its own name, or under all that share a hierarchy
            version, mounts = 1, dict.fromkeys((f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}"))
        else:
            continue
        # in a container the path may be the host's, with only its end or nothing mounted here
        group = Path(os.path.normpath("/" + path.lstrip("/")))
        for mount in mounts:
            for folder in (group, *group.parents):
                yield version, root / mount / folder.relative_to("/")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU time per second that control groups grant this process, in cores (`docker run --cpus=1.5`: 1.5). Return
    None without a limit.

    `root` is the folder that contains /proc and /sys.
    """
    quotas = [_quota_of_group(version, folder) for version, folder in group_folders("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of_group(version: int, folder: Path) -> float | None:
    """Return one group's quota in cores, or None without a limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group here, or its quota is "max"
        return None
