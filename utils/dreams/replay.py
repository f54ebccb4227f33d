"""A replay buffer on the device: flashbax's trajectory buffer, the flags that size it, and whether it fits."""

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
from utils.runs.flags import LARGEST, Count, Default, Needs, NotNegative, Positive, refuse_unread, require
from utils.runs.memory import free_memory

WANTED = Needs(use_replay_buffer=True)
KEPT_FREE = 3 * 2**30  # bytes that training itself may need, besides the buffer


@dataclass
class ReplayArgs:
    """Flags of the replay buffer."""

    use_replay_buffer: Annotated[bool, Default(atari=True)] = False
    """learn on sequences replayed from the device's memory instead of the fresh rollout"""
    replay_capacity: Annotated[Count, WANTED] = 500_000
    """environment steps that it holds, the oldest making room (7 KB each on Atari)"""
    replay_prefill: Annotated[Count, WANTED] = 20_000
    """environment steps before the first update"""
    replay_ratio: Annotated[NotNegative, WANTED] = 4.0
    """steps replayed for each new one"""
    replay_batch_size: Annotated[Count, WANTED] = 8
    """sequences in a minibatch"""
    replay_length: Annotated[Count, WANTED] = 32
    """steps of a sequence"""
    save_replay: Annotated[bool, WANTED] = False
    """checkpoints hold the buffer too (its whole size on the disk, and once more in memory while it is written); without it, a
    run that goes on fills it again first, with steps that count as none of its own"""
    off_policy: Annotated[Literal["vtrace", "clipped_ratio"], WANTED] = "vtrace"
    """how much a transition counts whose action an older policy mu chose, pi being the policy before the update. vtrace: pi/mu,
    truncated at --vtrace-max-weight. clipped_ratio: all of pi/mu, which is unbiased and unbounded (for a --replay-capacity of
    a few rollouts). Advantages and targets are V-trace's in both"""
    vtrace_max_weight: Annotated[Positive, WANTED] = 1.0
    """truncate pi/mu at this (V-trace's rho-bar and c-bar): 1 as in Espeholt et al. (2018); the paper's code has e^3 = 20.1"""

    def check(self) -> None:
        """Raises UsageError where the flags of the buffer do not go together, or not with those of the script around them."""
        if not self.use_replay_buffer:
            return
        require(
            self.replay_batch_size % self.num_devices == 0,
            f"--replay-batch-size {self.replay_batch_size}: --num-devices {self.num_devices} cannot share it; change one",
        )
        refuse_unread(self, ("update_epochs", "minibatch_by"), "the fresh rollout, without --use-replay-buffer")
        shortest = (self.replay_length + 1 + steps_before(family(self.env_id) == "atari")) * self.num_envs
        require(
            self.replay_prefill >= shortest,
            f"--replay-prefill {self.replay_prefill}: less than a sequence of --replay-length {self.replay_length} from each "
            f"of --num-envs {self.num_envs}: ask for at least {shortest}",
        )
        least = max(self.replay_prefill, self.num_envs * self.num_steps)
        require(
            self.replay_capacity // self.num_envs * self.num_envs >= least,
            f"--replay-capacity {self.replay_capacity}: must hold --replay-prefill and a rollout, in whole steps of --num-envs "
            f"{self.num_envs}: ask for at least {-(-least // self.num_envs) * self.num_envs}",
        )
        require(
            self.total_timesteps // (self.num_envs * self.num_steps) > prefill_iterations(self),
            f"--total-timesteps {self.total_timesteps}: over before --replay-prefill {self.replay_prefill} is; ask for more",
        )
        of_one = self.replay_batch_size * self.replay_length / (self.num_envs * self.num_steps)
        count = max(1, round(self.replay_ratio / of_one))
        require(count <= LARGEST, f"--replay-ratio {self.replay_ratio:g}: more than {LARGEST} minibatches; ask for less")
        require(
            abs(count * of_one - self.replay_ratio) < 1e-6 * of_one,
            f"--replay-ratio {self.replay_ratio:g}: is no whole number of minibatches of --replay-batch-size "
            f"{self.replay_batch_size} x --replay-length {self.replay_length} for each rollout of "
            f"{self.num_envs * self.num_steps} steps: the nearest is {count * of_one:g}",
        )


class Replayed(NamedTuple):
    """Consecutive steps, in the convention of a script's `Rollout`; of the last one only `obs` counts."""

    obs: Num[Array, "T B *obs"] | Newest | Stacks  # of stacked frames the newest where it is stored
    action: Int[Array, "T B"]
    log_probs: Float[Array, "T B A"]  # of all actions, of the policy that acted
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]


def prefill_iterations(args: Any) -> int:
    """Rollouts before the first update; of flags without a buffer, 0."""
    return -(-args.replay_prefill // (args.num_envs * args.num_steps)) if getattr(args, "use_replay_buffer", False) else 0


def go_on(state: Any, prefill: Callable, iteration: int, env: Env, args: Any) -> Any:
    """The state of a run that goes on from that iteration, with a buffer to go on with.

    One that was not saved is filled again: by as many rollouts of `prefill` as before the first update. They count as none of
    the run's. In one that was, the last step of each environment that started anew is marked as none: what will stand after
    it does not follow from it.
    """
    if not (iteration and args.use_replay_buffer):
        return state
    if args.save_replay:
        return state if env.saveable else state._replace(replay=end_last_step(state.replay))
    rollouts = min(iteration, prefill_iterations(args))
    steps = rollouts * args.num_envs * args.num_steps
    print(f"filling the replay buffer again: {steps:,} steps, which count as none of the run's", flush=True)
    for _ in range(rollouts):
        state = prefill(state)[0]._replace(iteration=jnp.asarray(iteration, jnp.int32))
    return state


def end_last_step(replay: Any) -> Any:
    """The buffer, whose last step of each environment is no transition any more."""
    valid = replay.experience.valid  # [B, T]
    valid = valid.at[:, (replay.current_index - 1) % valid.shape[1]].set(False)
    return replay.replace(experience=replay.experience._replace(valid=valid))


def replay_updates(args: Any) -> int:
    """Minibatches replayed after each rollout."""
    return round(args.replay_ratio * args.num_envs * args.num_steps / (args.replay_batch_size * args.replay_length))


def steps_before(stacks_frames: bool) -> int:
    """Steps that a sequence needs before its first one, for the frames that are stacked there."""
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
    return Replayed(obs, jnp.zeros((), jnp.int32), jnp.zeros(num_actions), number, flag, flag, flag)


def check_memory(env: Env, args: Any) -> None:
    """Checks that the device has enough free memory for the buffer, if one is asked for.

    Raises:
        UsageError: it has not; the message says how many steps would fit.
    """
    if not args.use_replay_buffer:
        return
    bytes_per_step = sum(x.nbytes for x in jax.tree.leaves(_empty_step(env)))
    needed, free = args.replay_capacity * bytes_per_step, max(0, free_memory() - KEPT_FREE)
    if jax.default_backend() != "cpu":  # each device holds a share; those of a CPU have the same memory
        free *= args.num_devices
    fits = free // bytes_per_step // args.num_envs * args.num_envs
    remedy = f"ask for {fits} or less" if fits else "free some, or leave out --use-replay-buffer"
    require(
        needed <= free,
        f"--replay-capacity {args.replay_capacity}: takes {needed / 2**30:.1f} GiB of memory, and there are "
        f"{free / 2**30:.1f} GiB for it; {remedy}",
    )


def init_replay(env: Any, args: Any) -> Any:
    """An empty buffer."""
    return make_split(lambda: _buffer(args, env.stacks_frames).init(_empty_step(env)))


def add(replay: Any, steps: Any, args: Any) -> Any:
    """The buffer with a rollout added, which goes on where the last one ended."""
    stacks_frames = isinstance(steps.obs, Stacks)
    obs = jax.tree.map(lambda x: x[:-1], steps.obs.newest() if stacks_frames else steps.obs)
    fields = steps._asdict() | {"obs": obs}
    steps = Replayed(*(fields[name] for name in Replayed._fields))
    return _buffer(args, stacks_frames).add(replay, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps))


def sample(replay: Any, key: jax.Array, args: Any) -> Replayed:
    """`replay_batch_size` stored sequences of `replay_length` + 1 steps, [T, B], drawn uniformly; they may overlap."""
    stacks_frames = isinstance(replay.experience.obs, Newest)
    stored = _buffer(args, stacks_frames).sample(replay, key).experience
    stored = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), stored)
    steps = jax.tree.map(lambda x: x[steps_before(stacks_frames) :], stored)
    return steps._replace(obs=Stacks(stored.obs.frame, steps.obs.age)) if stacks_frames else steps


def for_policy(
    params: Any, steps: Replayed, agent: Any, args: Any
) -> tuple[dict[str, Array], Bool[Array, " N"], Float[Array, " N"]]:
    """The fields of a script's `Minibatch` of the steps, for the policy and critic of these parameters; which of the steps
    ended; and how much each counts (`--off-policy`)."""
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
    return fields, steps.terminated, flat(weight[:-1])


def vtrace(
    steps: Replayed, value: Float[Array, "T B"], weight: Float[Array, "T B"], gamma: float, gae_lambda: float
) -> tuple[Float[Array, "T-1 B"], Float[Array, "T-1 B"]]:
    """Advantages, and targets of the critic, by V-trace (Espeholt et al., 2018, equation 1); where a step is not valid, 0 and
    its value.

    A[t] = error[t] + gamma lambda weight[t + 1] A[t + 1], and the target is value[t] + weight[t] A[t]. `weight` is their rho
    and c, pi/mu truncated, lambda that of their remark 2. What A is multiplied by at t itself is left to the policy's loss.
    Where the weights are 1, A is the generalized advantage estimate.
    """
    steps = jax.tree.map(lambda x: x[:-1], steps)
    error = steps.reward + gamma * (1.0 - steps.terminated) * value[1:] - value[:-1]
    going_on = steps.valid & ~(steps.terminated | steps.truncated)
    advantage = decayed_sums(jnp.where(steps.valid, error, 0.0), gamma * gae_lambda * going_on * weight[1:])
    return advantage, value[:-1] + weight[:-1] * advantage
