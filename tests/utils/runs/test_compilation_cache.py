"""Programs that are kept from one start to the next."""

import os
import subprocess
import sys

import pytest

from tests.commands import ROOT

PROGRAM = """
import jax, jax.numpy as jnp
from utils.runs.compilation_cache import keep_compiled
keep_compiled()
print(float(jax.jit(lambda x: jnp.sum(jnp.sort(x) ** 3))(jnp.arange(9.0))))
"""


def start(home, **variables):
    """What a process prints, on both streams, that has JAX keep every program."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    env |= {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def programs(home):
    return {path: path.stat().st_mtime_ns for path in home.glob("deep-spi/*/*-cache")}


def times_of_use(home):
    return {path: path.read_bytes() for path in home.glob("deep-spi/*/*-atime")}


def test_the_second_start_finds_them_and_what_was_cut_off_is_made_anew(tmp_path):
    assert start(tmp_path) == "1296.0\n"
    first = programs(tmp_path)
    assert first
    read = times_of_use(tmp_path)
    assert start(tmp_path) == "1296.0\n" and programs(tmp_path) == first
    assert all(after != read[path] for path, after in times_of_use(tmp_path).items())
    cut = max(first, key=lambda path: path.stat().st_size)
    whole = cut.stat().st_size
    os.truncate(cut, 100)  # killed while it was written
    cut.with_name(cut.name.removesuffix("-cache") + "-atime").unlink()
    assert start(tmp_path) == "1296.0\n" and abs(cut.stat().st_size - whole) < 100


def test_a_damaged_program_is_said_and_made_anew(tmp_path):
    start(tmp_path)
    whole = {path: path.stat().st_size for path in programs(tmp_path)}
    for path in whole:
        os.truncate(path, 100)  # its time of use stays, so it does not look unfinished
    *said, result = start(tmp_path).splitlines()
    assert result == "1296.0" and len(said) == len(whole) and all("damaged; compiling it again" in line for line in said)
    assert all(abs(path.stat().st_size - size) < 100 for path, size in whole.items())
    assert start(tmp_path) == "1296.0\n"


@pytest.mark.parametrize("variables, said", [({}, "not cached"), ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "")])
def test_where_nothing_can_be_kept_one_line_says_so(variables, said, tmp_path):
    home = tmp_path / "file"
    home.touch()
    *lines, result = start(home, **variables).splitlines()
    assert result == "1296.0" and len(lines) == bool(said)
    assert all(said in line and "JAX_COMPILATION_CACHE_DIR" in line for line in lines)
