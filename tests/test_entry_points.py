"""Every script that a user starts is set up before its other imports."""

import os
import subprocess
import sys

import pytest

from tests.commands import CARTPOLE, PPO, ROOT, run

OTHERS = ("rejax_ppo.py", "torch_ppo.py")  # with packages of their own
SCRIPTS = [path for folder in ("", "experiments", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path for path in SCRIPTS if '"__main__"' in path.read_text() and path.name not in OTHERS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_python_without_packages_gets_one_line(script, tmp_path):
    """The first import of a package comes after the setup, and errors go through it."""
    bare = [sys.executable, "-E", "-S", str(script)]  # without site-packages
    done = subprocess.run(bare, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: package") and "uv run" in line
    assert "run_main(" in script.read_text() or "run_script(" in script.read_text()


def test_there_are_scripts():
    assert {"deep_spi", "evaluate", "report", "seeds", "guarantees", "throughput"} < {path.stem for path in SCRIPTS}


def test_a_backend_that_only_a_notebook_has(tmp_path):
    """Matplotlib, which envpool imports, refuses a backend that is not installed, as that of a notebook is not for `uv run`."""
    (tmp_path / "matplotlibrc").write_bytes(b"font.family: \xff\n")  # which it cannot read either
    of_user = {"MPLBACKEND": "of_another_python", "MATPLOTLIBRC": str(tmp_path)}
    done = run(PPO, *CARTPOLE, f"--logdir={tmp_path / 'runs'}", "--keep-checkpoints=0", **of_user)
    assert done.returncode == 0 and "ended after 96 steps" in done.stdout, done.stderr
