"""CPU time under the quotas of control groups of both versions. Their folders: also tests/utils/test_memory.py."""

import pytest

from tests.control_groups import printed_in_group
from utils.control_groups import cpu_quota


def host(root, lines, groups):
    """A machine whose files say so: of each folder below sys/fs/cgroup, the contents of its files."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(lines)
    for folder, contents in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text)
    return root


def v1(quota, period=100_000):
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


def v2(text):
    return {"cpu.max": f"{text}\n"}


@pytest.mark.parametrize(
    "lines, groups, quota",
    [
        ("", {}, None),
        ("0::/a\n", {}, None),
        ("0::/\n", {".": v2("400000 100000")}, 4.0),  # a container with a view of its own
        ("0::/a/b\n", {"a/b": v2("max 100000"), "a": v2("75000 50000")}, 1.5),  # a group above
        ("0::/a/b\n", {"a/b": v2("50000 100000"), "a": v2("75000 50000")}, 0.5),
        ("0::/a\n", {"a": v2("max 100000")}, None),
        ("0::/a\n", {"a": v2("")}, None),
        ("4:cpu,cpuacct:/docker/x\n", {"cpu,cpuacct/docker/x": v1(-1), "cpu,cpuacct": v1(-1)}, None),
        ("4:cpu,cpuacct:/docker/x\n0::/\n", {"cpu,cpuacct/docker/x": v1(250_000)}, 2.5),
        ("4:cpuacct,cpu:/docker/x\n", {"cpu": v1(60_000, 20_000)}, 3.0),  # the host's path, and its end mounted here
        ("9:cpuset:/x\n3:memory:/x\n", {"cpuset/x": v1(100_000), "memory/x": v1(100_000)}, None),
    ],
)
def test_the_smallest_quota_counts(lines, groups, quota, tmp_path):
    assert cpu_quota(host(tmp_path, lines, groups)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


def test_a_real_group():
    """One of version 1 or 2, made for this test, where the machine lets us."""
    limits = {"cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}, "": {"cpu.max": "150000 100000"}}
    assert 0 < float(printed_in_group("from utils.control_groups import cpu_quota; print(cpu_quota())", limits)) <= 1.5
