"""A replay buffer on the device: flashbax's trajectory buffer, its flags, and a check that it fits in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from envs.frames import STACK, Newest, Stacks
from envs.protocol import Env
from envs.registry import family
from utils.devices import make_split
from utils.losses import decayed_sums
from utils.memory import free_memory
from utils.runs.flag_types import LARGEST, Count, Default, Needs, NotNegative, Positive
from utils.runs.flags import refuse_unread, require

WANTED = Needs(use_replay_buffer=True)
KEPT_FREE = 3 * 2**30  # bytes reserved for training itself


@dataclass
class ReplayArgs:
    """Flags of the replay buffer."""

    use_replay_buffer: Annotated[bool, Default(atari=True)] = False
    """train on sequences from a replay buffer in device memory instead of the fresh rollout"""
    replay_capacity: Annotated[Count, WANTED] = 500_000
    """capacity in environment steps (7 KB each on Atari); new steps overwrite the oldest"""
    replay_prefill: Annotated[Count, WANTED] = 20_000
    """environment steps before the first update"""
    replay_ratio: Annotated[NotNegative, WANTED] = 4.0
    """replayed steps per new environment step"""
    replay_batch_size: Annotated[Count, WANTED] = 8
    """sequences per minibatch"""
    replay_length: Annotated[Count, WANTED] = 32
    """steps per sequence"""
    save_replay: Annotated[bool, WANTED] = False
    """save the buffer in checkpoints (takes its size on disk, and again in memory during writing); otherwise, a resumed run
    first refills the buffer, with steps that do not count toward the run"""
    off_policy: Annotated[Literal["vtrace", "clipped_ratio"], WANTED] = "vtrace"
    """weight of a transition: mu is the older policy that chose the action, and pi the policy before the update (with
    --dreams-from replay, the current one). vtrace: pi/mu, truncated at --vtrace-max-weight. clipped_ratio: the full pi/mu,
    unbiased but unbounded (for a --replay-capacity of a few rollouts). Both use V-trace advantages and targets"""
    vtrace_max_weight: Annotated[Positive, WANTED] = 1.0
    """upper limit of pi/mu (V-trace's rho-bar and c-bar): 1 as in Espeholt et al. (2018); the paper's code uses e^3 = 20.1"""

    def check(self) -> None:
        """Raise UsageError if the buffer's flags contradict each other or those of the script."""
        if not self.use_replay_buffer:
            return
        require(
            self.replay_batch_size % self.num_devices == 0,
            f"--replay-batch-size {self.replay_batch_size}: must be a multiple of --num-devices {self.num_devices}; change one",
        )
        refuse_unread(self, ("num_minibatches", "update_epochs", "minibatch_by"), "--no-use-replay-buffer")
        shortest = (self.replay_length + 1 + steps_before(family(self.env_id) == "atari")) * self.num_envs
        require(
            self.replay_prefill >= shortest,
            f"--replay-prefill {self.replay_prefill}: is less than one sequence of --replay-length {self.replay_length} for "
            f"each of --num-envs {self.num_envs}; use at least {shortest}",
        )
        least = max(self.replay_prefill, self.num_envs * self.num_steps)
        require(
            self.replay_capacity // self.num_envs * self.num_envs >= least,
            f"--replay-capacity {self.replay_capacity}: is too small for --replay-prefill or one rollout, in whole steps of "
            f"--num-envs {self.num_envs}; use at least {-(-least // self.num_envs) * self.num_envs}",
        )
        require(
            self.total_timesteps // (self.num_envs * self.num_steps) > prefill_iterations(self),
            f"--total-timesteps {self.total_timesteps}: leaves no steps after --replay-prefill {self.replay_prefill}; use more",
        )
        of_one = self.replay_batch_size * self.replay_length / (self.num_envs * self.num_steps)
        count = max(1, round(self.replay_ratio / of_one))
        require(count <= LARGEST, f"--replay-ratio {self.replay_ratio:g}: gives more than {LARGEST} minibatches; use less")
        require(
            abs(count * of_one - self.replay_ratio) < 1e-6 * of_one,
            f"--replay-ratio {self.replay_ratio:g}: does not give a whole number of minibatches (--replay-batch-size "
            f"{self.replay_batch_size} x --replay-length {self.replay_length}) per rollout of "
            f"{self.num_envs * self.num_steps} steps; the nearest is {count * of_one:g}",
        )


class Replayed(NamedTuple):
    """Consecutive steps, in the convention of a script's `Rollout`. Of the last step, only `obs` is used."""

    obs: Num[Array, "T B *obs"] | Newest | Stacks  # stacked frames: only the newest is stored
    action: Int[Array, "T B"]
    log_probs: Float[Array, "T B A"]  # of all actions, under the policy that acted
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]
    unseen_end: Bool[Array, "T B"]


def prefill_iterations(args: Any) -> int:
    """Return the number of rollouts before the first update; 0 without a buffer."""
    return -(-args.replay_prefill // (args.num_envs * args.num_steps)) if getattr(args, "use_replay_buffer", False) else 0


def refill(state: Any, prefill: Callable, iteration: int, env: Env, args: Any) -> Any:
    """Return the state of a run resumed at `iteration`, with a usable buffer.

    An unsaved buffer is refilled by `prefill`, with as many rollouts as before the first update (at most `iteration`).
    They do not count toward the run. A saved buffer is kept, but if the environments restart, the last stored step of each is
    masked: the step stored next does not follow from it.
    """
    if not (iteration and args.use_replay_buffer):
        return state
    if args.save_replay:
        return state if env.saveable else state._replace(replay=end_last_step(state.replay))
    rollouts = min(iteration, prefill_iterations(args))
    steps = rollouts * args.num_envs * args.num_steps
    print(f"refilling the replay buffer: {steps:,} steps, which do not count toward the run", flush=True)
    for _ in range(rollouts):
        state = prefill(state)[0]._replace(iteration=jnp.asarray(iteration, jnp.int32))
    return state


def end_last_step(replay: Any) -> Any:
    """Mask the last stored step of each environment, so that it is not used as a transition."""
    valid = replay.experience.valid  # [B, T]
    valid = valid.at[:, (replay.current_index - 1) % valid.shape[1]].set(False)
    return replay.replace(experience=replay.experience._replace(valid=valid))


def replay_updates(args: Any) -> int:
    """Return the number of minibatches replayed after each rollout."""
    return round(args.replay_ratio * args.num_envs * args.num_steps / (args.replay_batch_size * args.replay_length))


def steps_before(stacks_frames: bool) -> int:
    """Return the number of extra steps before a sequence, from which its first frame stacks are built."""
    return STACK - 1 if stacks_frames else 0


def _buffer(args: Any, stacks_frames: bool) -> Any:
    length = args.replay_length + 1 + steps_before(stacks_frames)
    return flashbax.make_trajectory_buffer(
        add_batch_size=args.num_envs,
        sample_batch_size=args.replay_batch_size,
        sample_sequence_length=length,
        period=1,
        min_length_time_axis=length,
        max_length_time_axis=args.replay_capacity // args.num_envs,
    )


def _empty_step(env: Any) -> Replayed:
    flag, number, num_actions = jnp.zeros((), bool), jnp.zeros(()), env.num_actions
    shape, dtype = env.obs_spec.shape, env.obs_spec.dtype
    obs = Newest(jnp.zeros(shape[1:], dtype), jnp.zeros((), jnp.int8)) if env.stacks_frames else jnp.zeros(shape, dtype)
    return Replayed(obs, jnp.zeros((), jnp.int32), jnp.zeros(num_actions), number, flag, flag, flag, flag)


def check_memory(env: Env, args: Any) -> None:
    """Check that the device has enough free memory for the buffer, if there is one.

    Raises:
        UsageError: it does not; the message contains the number of steps that would fit.
    """
    if not args.use_replay_buffer:
        return
    bytes_per_step = sum(x.nbytes for x in jax.tree.leaves(_empty_step(env)))
    needed, free = args.replay_capacity * bytes_per_step, max(0, free_memory() - KEPT_FREE)
    if jax.default_backend() != "cpu":  # each device holds a part; CPU devices share one memory
        free *= args.num_devices
    fits = free // bytes_per_step // args.num_envs * args.num_envs
    remedy = f"use {fits} or less" if fits else "free some memory, or use --no-use-replay-buffer"
    require(
        needed <= free,
        f"--replay-capacity {args.replay_capacity}: needs {needed / 2**30:.1f} GiB of memory, but only "
        f"{free / 2**30:.1f} GiB are available; {remedy}",
    )


def init_replay(env: Any, args: Any) -> Any:
    """Create an empty buffer, or None without `--use-replay-buffer`."""
    if not args.use_replay_buffer:
        return None
    return make_split(lambda: _buffer(args, env.stacks_frames).init(_empty_step(env)))


def add(replay: Any, steps: Any, args: Any) -> Any:
    """Add a rollout to the buffer, if there is one. It must continue where the last one ended."""
    if not args.use_replay_buffer:
        return replay
    stacks_frames = isinstance(steps.obs, Stacks)
    obs = jax.tree.map(lambda x: x[:-1], steps.obs.newest() if stacks_frames else steps.obs)
    fields = steps._asdict() | {"obs": obs}
    steps = Replayed(*(fields[name] for name in Replayed._fields))
    return _buffer(args, stacks_frames).add(replay, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps))


def sample(replay: Any, key: jax.Array, args: Any) -> Replayed:
    """Draw `replay_batch_size` stored sequences of `replay_length` + 1 steps uniformly, [T, B]. They may overlap."""
    stacks_frames = isinstance(replay.experience.obs, Newest)
    stored = _buffer(args, stacks_frames).sample(replay, key).experience
    stored = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), stored)
    steps = jax.tree.map(lambda x: x[steps_before(stacks_frames) :], stored)
    return steps._replace(obs=Stacks(stored.obs.frame, steps.obs.age)) if stacks_frames else steps


def for_policy(
    params: Any, steps: Replayed, agent: Any, args: Any
) -> tuple[dict[str, Array], Bool[Array, " N"], Float[Array, " N"]]:
    """Return, for the replayed steps, the fields of a script's `Minibatch` with the policy and critic of `params`; which steps
    terminated; and the weight of each step (`--off-policy`)."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    obs = flat(steps.obs[jnp.arange(len(steps.obs))])
    logits, value = agent.actor_critic.apply(params.actor_critic, agent.encoder.apply(params.encoder, obs))
    value, log_probs = value.reshape(steps.reward.shape), jax.nn.log_softmax(logits).reshape(steps.log_probs.shape)
    taken = jnp.take_along_axis(log_probs - steps.log_probs, steps.action[..., None], axis=-1)[..., 0]
    ratio = jnp.exp(jnp.where(steps.valid, taken, 0.0))
    truncated_ratio = jnp.minimum(ratio, args.vtrace_max_weight)
    advantage, target = vtrace(steps, value, truncated_ratio, args.gamma, args.gae_lambda)
    weight = truncated_ratio if args.off_policy == "vtrace" else ratio
    steps = jax.tree.map(lambda x: flat(x[:-1]), steps._replace(obs=None))
    fields = {"obs": obs, "action": steps.action, "log_probs": flat(log_probs[:-1]), "value": flat(value[:-1])}
    fields |= {"advantage": flat(advantage), "target": flat(target), "reward": steps.reward, "valid": steps.valid}
    fields["unseen_end"] = steps.unseen_end
    return fields, steps.terminated, flat(weight[:-1])


def vtrace(
    steps: Replayed, value: Float[Array, "T B"], weight: Float[Array, "T B"], gamma: float, gae_lambda: float
) -> tuple[Float[Array, "T-1 B"], Float[Array, "T-1 B"]]:
    """Return V-trace's advantages and critic targets (Espeholt et al., 2018, equation 1). Where a step is not valid, they are 0
    and the step's value.

    A[t] = error[t] + gamma lambda weight[t + 1] A[t + 1], and the target is value[t] + weight[t] A[t]. `weight` is their rho
    and c (the truncated pi/mu), and lambda is from their remark 2. A[t] is not multiplied by weight[t]; the policy's loss
    does that. If all weights are 1, A is the generalized advantage estimate.
    """
    steps = jax.tree.map(lambda x: x[:-1], steps)
    error = steps.reward + gamma * (1.0 - steps.terminated) * value[1:] - value[:-1]
    going_on = steps.valid & ~(steps.terminated | steps.truncated)
    advantage = decayed_sums(jnp.where(steps.valid, error, 0.0), gamma * gae_lambda * going_on * weight[1:])
    return advantage, value[:-1] + weight[:-1] * advantage
