"""Scripts as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PPO = "ppo_atari_envpool_xla_jax_scan.py"
SMALL = ["--num-envs=8", "--num-steps=4", "--total-timesteps=96", "--fc-layers=32"]
CARTPOLE = ["--env-id=CartPole-v1", *SMALL]


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *flags]


def run(script, *flags, timeout=300, **env):
    """Output and exit code of a script; `env` adds to the environment's variables."""
    return subprocess.run(command(script, *flags), capture_output=True, text=True, env=os.environ | env, timeout=timeout)
