"""Free memory, under the limits of control groups of both versions and of a device."""

from pathlib import Path

import pytest

from tests.control_groups import printed_in_group
from utils import memory
from utils.memory import free_host_memory, free_memory

MIB = 2**20


def files(folder: Path, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


def groups(root, lines):
    files(root / "proc" / "self", cgroup=lines)


@pytest.fixture
def host(tmp_path):
    files(tmp_path / "proc", meminfo=f"MemTotal: 900 kB\nMemAvailable:   {800 * 1024} kB\n")
    return tmp_path


def v2(root, path, limit, used=0, cached=0):
    stat = f"anon 1\nactive_file 5\ninactive_file {cached}\n"
    contents = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    files(root / "sys/fs/cgroup" / path, **contents)


def v1(root, path, limit, used=0, cached=0):
    stat = f"inactive_file 7\ntotal_inactive_file {cached}\n"
    contents = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    files(root / "sys/fs/cgroup/memory" / path, **contents)


def test_without_groups_it_is_what_the_kernel_says(host):
    assert free_host_memory(host) == 800 * MIB
    groups(host, "0::/a/b\n")  # nothing of it is mounted
    assert free_host_memory(host) == 800 * MIB


def test_the_own_group_of_version_2(host):
    groups(host, "0::/a/b\n")
    v2(host, "a/b", 500 * MIB, used=300 * MIB, cached=50 * MIB)
    assert free_host_memory(host) == 250 * MIB
    v2(host, "a/b", "max", used=300 * MIB)
    assert free_host_memory(host) == 800 * MIB
    v2(host, "a/b", 500 * MIB, used=600 * MIB)
    assert free_host_memory(host) == 0


def test_a_group_above_may_leave_less(host):
    groups(host, "0::/slice/job/step\n")
    v2(host, "slice/job/step", "max")
    v2(host, "slice/job", 400 * MIB, used=100 * MIB)
    v2(host, "slice", 450 * MIB, used=250 * MIB, cached=10 * MIB)
    assert free_host_memory(host) == 210 * MIB
    # the topmost one that a container sees is its own, wherever the host has put it
    groups(host, "0::/../elsewhere\n")
    v2(host, ".", 90 * MIB)
    assert free_host_memory(host) == 90 * MIB


def test_version_1_beside_an_empty_version_2(host):
    groups(host, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    v1(host, "docker/abc", 300 * MIB, used=100 * MIB, cached=20 * MIB)
    v1(host, ".", 9223372036854771712)
    assert free_host_memory(host) == 220 * MIB
    # a container without a view of its own: the path is the host's, the limit stands at the mount
    groups(host, "4:memory:/kubepods/xyz\n")
    v1(host, ".", 70 * MIB)
    assert free_host_memory(host) == 70 * MIB


def test_a_real_group():
    """One of version 1 or 2, made for this test, where the machine lets us."""
    limits = {"memory": {"memory.limit_in_bytes": str(300 * MIB)}, "": {"memory.max": str(300 * MIB)}}
    code = "from utils.memory import free_host_memory; print(free_host_memory())"
    assert 0 < int(printed_in_group(code, limits)) <= 300 * MIB


def test_of_a_device(monkeypatch):
    class Gpu:
        platform = "gpu"
        statistics = {"bytes_limit": 1000, "bytes_in_use": 10}

        def memory_stats(self):
            return self.statistics

    monkeypatch.setattr(memory.jax, "devices", lambda: [Gpu()])
    assert free_memory() == 990
    Gpu.statistics = None  # other allocators keep none
    assert free_memory() >= 2**60
