"""What every run has in common: its flags, its start and its errors."""

import difflib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import tyro

from envs.registry import GRIDWORLD, check_gridworld, env_ids, is_atari


class UsageError(Exception):
    """A mistake of whoever started the run. Its text is one line that names the flag and the remedy."""


@dataclass
class RunArgs:
    """Flags of a run, whatever its algorithm."""

    env_id: str = "Breakout-v5"
    """the environment: an Atari game as envpool names it; ConfoundingGridworld-v0; or CartPole-v1, Acrobot-v1, Catch-v0"""
    reward_clip: bool = True
    """Atari: train on the sign of the rewards (logged returns are never clipped)"""
    stochastic_env: bool = False
    """Atari: the stochastic protocol: actions are repeated with probability 0.3, up to 60 no-ops start a game"""
    gridworld_n_path: int = 5
    """ConfoundingGridworld-v0: the column of the two choices"""
    gridworld_epsilon: float = 0.2
    """ConfoundingGridworld-v0: probability of the lower path"""
    seed: int = 1
    """seed of everything random: parameters, environments, actions, minibatches"""
    total_timesteps: int = 10_000_000
    """environment steps of the whole run (agent steps; an Atari step is 4 frames)"""
    logdir: str = "runs"
    """where TensorBoard files are written, in a folder of the run's own"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline keeps it on this machine)"""
    wandb_project_name: str = "deep-spi"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team; your own account if not given"""
    wandb_group: str | None = None
    """W&B group, for runs to be averaged together"""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags"""


def require(condition: bool, message: str) -> None:
    """Raises UsageError with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def refuse_unread(args: Any, flags: tuple[str, ...], needed: str) -> None:
    """Raises UsageError for the first of the flags, none of which will be read, that was given a value of its own.

    `needed` says with what they would be.
    """
    for flag in flags:
        value, default = getattr(args, flag), type(args).__dataclass_fields__[flag].default
        name = flag.replace("_", "-")
        typed = f"--{'' if value else 'no-'}{name}" if isinstance(default, bool) else f"--{name} {value}"
        require(value == default, f"{typed}: is read only with {needed}; leave it out")


def check_run(args: RunArgs) -> None:
    """Checks the flags of `RunArgs`; `gamma`, which the gridworld's rewards depend on, is the script's.

    Raises:
        UsageError: the first mistake found.
    """
    known = env_ids()
    if args.env_id not in known:
        close = difflib.get_close_matches(args.env_id, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see envs/registry.py for the ids it takes"
        raise UsageError(f"--env-id {args.env_id}: no such environment; {hint}")
    if not is_atari(args.env_id):
        refuse_unread(args, ("reward_clip", "stochastic_env"), "an Atari game")
    if args.env_id == GRIDWORLD:
        try:
            check_gridworld(args)
        except ValueError as error:
            flag = str(error).replace("_", "-")
            raise UsageError(f"--{'' if flag.startswith('gamma') else 'gridworld-'}{flag}") from None
    else:
        refuse_unread(args, ("gridworld_n_path", "gridworld_epsilon"), f"--env-id {GRIDWORLD}")
    if not args.track:
        refuse_unread(args, ("wandb_project_name", "wandb_entity", "wandb_group", "wandb_tags"), "--track")
    require(args.seed >= 0, f"--seed {args.seed}: choose a seed of 0 or more")


def run_script(main: Callable, args_type: type) -> None:
    """Parses the command line and runs `main`. A mistake of the user's ends in one line and exit code 2."""
    args = tyro.cli(args_type)
    try:
        main(args)
    except UsageError as error:
        sys.exit(_fail(str(error), 2))
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(_fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(_fail("out of memory: lower --num-envs, --num-steps (or --replay-capacity), or raise --num-minibatches", 1))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
        sys.exit(130)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def describe_device() -> str:
    """One line on what JAX computes on; where that is the CPU, a second one on how to get a GPU used."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"device: {device.device_kind} ({jax.device_count()} visible, one used), jax {jax.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    why = "JAX_PLATFORMS asks for it" if "cpu" in os.environ.get("JAX_PLATFORMS", "") else "JAX found no GPU"
    return (
        f"device: CPU, {cores} cores, jax {jax.__version__}\n"
        f"*** RUNNING ON THE CPU: {why}. For an NVIDIA GPU: uv sync --extra cuda13 (driver 580 or newer), or\n"
        "*** uv sync --extra cuda12 (driver 525 or newer); without uv: pip install 'jax[cuda13]'. ***"
    )
