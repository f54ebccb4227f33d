"""A replay buffer on the device: flashbax's trajectory buffer, the flags that size it, and whether it fits."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from utils.run import refuse_unread, require

KEPT_FREE = 3 * 2**30  # bytes that training itself may need, besides the buffer


@dataclass
class ReplayArgs:
    """Flags of the replay buffer."""

    use_replay_buffer: bool = False
    """learn on sequences replayed from the device's memory instead of the fresh rollout (dreams still start from that)"""
    replay_capacity: int = 500_000
    """environment steps that it holds, the oldest making room (28 KB each on Atari)"""
    replay_prefill: int = 20_000
    """environment steps before the first update"""
    replay_ratio: float = 4.0
    """steps replayed for each new one"""
    replay_batch_size: int = 64
    """sequences in a minibatch"""
    replay_length: int = 32
    """steps of a sequence"""
    off_policy: Literal["vtrace", "clipped_ratio"] = "vtrace"
    """what corrects for the older policies that chose the actions. vtrace: advantages weigh each error by min(1, pi/mu), and
    ratios are to the present policy pi. clipped_ratio: ratios are to the policy mu that acted, and clipped to pi/mu +- eps"""


class Replayed(NamedTuple):
    """Consecutive steps, in the convention of a script's `Rollout`; of the last one only `obs` counts."""

    obs: Num[Array, "T B *obs"]
    action: Int[Array, "T B"]
    log_probs: Float[Array, "T B A"]  # of all actions, of the policy that acted
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]


def check_replay(args: Any) -> None:
    """Checks the flags of `ReplayArgs`, given those of the script around them.

    Raises:
        UsageError: the first mistake found.
    """
    if not args.use_replay_buffer:
        flags = tuple(name for name in ReplayArgs.__dataclass_fields__ if name != "use_replay_buffer")
        return refuse_unread(args, flags, "--use-replay-buffer")
    refuse_unread(args, ("update_epochs", "minibatch_by"), "the fresh rollout, without --use-replay-buffer")
    for flag in ("replay_batch_size", "replay_length"):
        require(getattr(args, flag) > 0, f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    shortest = (args.replay_length + 1) * args.num_envs
    require(
        args.replay_prefill >= shortest,
        f"--replay-prefill {args.replay_prefill}: less than a sequence of --replay-length {args.replay_length} from each of "
        f"--num-envs {args.num_envs}: ask for at least {shortest}",
    )
    least = max(args.replay_prefill, args.num_envs * args.num_steps)
    require(
        args.replay_capacity // args.num_envs * args.num_envs >= least,
        f"--replay-capacity {args.replay_capacity}: must hold --replay-prefill and a rollout, in whole steps of --num-envs "
        f"{args.num_envs}: ask for at least {-(-least // args.num_envs) * args.num_envs}",
    )
    require(
        args.total_timesteps // (args.num_envs * args.num_steps) > prefill_iterations(args),
        f"--total-timesteps {args.total_timesteps}: over before --replay-prefill {args.replay_prefill} is; ask for more",
    )
    smallest = args.replay_batch_size * args.replay_length / (args.num_envs * args.num_steps)
    require(
        args.replay_ratio >= smallest,
        f"--replay-ratio {args.replay_ratio}: less than one minibatch of --replay-batch-size {args.replay_batch_size} x "
        f"--replay-length {args.replay_length} for each rollout: ask for at least {smallest:g}",
    )


def prefill_iterations(args: Any) -> int:
    """Rollouts before the first update."""
    return -(-args.replay_prefill // (args.num_envs * args.num_steps)) if args.use_replay_buffer else 0


def replay_updates(args: Any) -> int:
    """Minibatches replayed after each rollout."""
    return round(args.replay_ratio * args.num_envs * args.num_steps / (args.replay_batch_size * args.replay_length))


def _buffer(args: Any) -> Any:
    return flashbax.make_trajectory_buffer(
        add_batch_size=args.num_envs,
        sample_batch_size=args.replay_batch_size,
        sample_sequence_length=args.replay_length + 1,
        period=1,
        min_length_time_axis=args.replay_length + 1,
        max_length_time_axis=args.replay_capacity // args.num_envs,
    )


def _empty_step(obs_spec: jax.ShapeDtypeStruct, num_actions: int) -> Replayed:
    flag, number = jnp.zeros((), bool), jnp.zeros(())
    obs = jnp.zeros(obs_spec.shape, obs_spec.dtype)
    return Replayed(obs, jnp.zeros((), jnp.int32), jnp.zeros(num_actions), number, flag, flag, flag)


def check_memory(obs_spec: jax.ShapeDtypeStruct, num_actions: int, args: Any) -> None:
    """Checks that the device has enough free memory for the buffer, if one is asked for.

    Raises:
        UsageError: it has not; the message says how many steps would fit.
    """
    if not args.use_replay_buffer:
        return
    bytes_per_step = sum(x.nbytes for x in _empty_step(obs_spec, num_actions))
    needed, free = args.replay_capacity * bytes_per_step, max(0, free_memory() - KEPT_FREE)
    fits = free // bytes_per_step // args.num_envs * args.num_envs
    require(
        needed <= free,
        f"--replay-capacity {args.replay_capacity}: takes {needed / 2**30:.1f} GiB of memory, and there are "
        f"{free / 2**30:.1f} GiB for it; ask for {fits} or less",
    )


def init_replay(obs_spec: jax.ShapeDtypeStruct, num_actions: int, args: Any) -> Any:
    """An empty buffer."""
    return _buffer(args).init(_empty_step(obs_spec, num_actions))


def add(replay: Any, steps: Any, args: Any) -> Any:
    """The buffer with a rollout added, which goes on where the last one ended."""
    fields = steps._asdict() | {"obs": steps.obs[:-1]}
    return _buffer(args).add(replay, Replayed(*(jnp.swapaxes(fields[name], 0, 1) for name in Replayed._fields)))


def sample(replay: Any, key: jax.Array, args: Any) -> Replayed:
    """`replay_batch_size` stored sequences of `replay_length` + 1 steps, [T, B], drawn uniformly; they may overlap."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), _buffer(args).sample(replay, key).experience)


def free_memory() -> int:
    """Bytes that JAX may still allocate on its device."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is not None and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    if Path("/proc/meminfo").exists():
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # the limit of a container
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # none is set, or this is no Linux
        return free
    return min(free, limit)
