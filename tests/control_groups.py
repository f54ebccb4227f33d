"""A process in a control group that is made for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT


def printed_in_group(code: str, limits: dict[str, dict[str, str]]) -> str:
    """Return what the code prints in a new control group. `limits` has the files to write by mount, the first that works."""
    for mount, contents in limits.items():
        group = Path("/sys/fs/cgroup") / mount / f"test_{os.getpid()}"
        try:
            group.mkdir()
            for name, text in contents.items():
                (group / name).write_text(text)
            break
        except OSError:
            if group.exists():
                group.rmdir()
    else:
        pytest.skip("no control group can be made here")
    enter = "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
    try:
        done = subprocess.run([sys.executable, "-c", enter + code, str(group)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    finally:
        group.rmdir()
