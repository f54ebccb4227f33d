"""DeepMDP with PPO on envpool's Atari: a world model as an auxiliary loss (Gelada et al., 2019, arXiv 1906.02736).

    python deep_mdp_ppo.py --env-id=Breakout-v5

PPO plus the losses of a latent world model, which shape the representation. This is the baseline of Deep SPI, with the
same networks and losses. Here the model losses are outside the clipped ratio, so the model is fitted where the data was
collected, and a high model error does not lower the utility of an action. `diff deep_mdp_ppo.py deep_spi.py` shows this,
Deep SPI's options, and two hooks for `dream_spi.py`.

Read from top to bottom: flags, records, rollout, advantages, loss, update, main.
Shapes: T steps x B environments; a minibatch has N transitions.
"""

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()  # Ctrl-C during the remaining imports leaves no traceback

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, Scalar

from envs.frames import Stacks
from envs.observations import Part
from envs.protocol import Env, EpisodeStats
from envs.registry import make_env
from envs.scan import scan_steps
from networks.architectures import make_actor_critic, make_encoder
from networks.flags import NetworkArgs, WorldModelArgs
from networks.world_models import make_world_model
from utils.devices import by_device, on_each_device
from utils.guarantees.monitor import MonitorArgs, monitor_occasionally
from utils.histograms import track_gradients
from utils.losses import masked_mean, masked_normalize, smooth_l1_loss
from utils.metrics import rollout_metrics, summarize
from utils.neighborhood import backtrack, gradient_steps, ratio_metrics
from utils.runs.flag_types import BY_FAMILY, Count, InsideUnit, NotNegative, Positive, Share
from utils.runs.flags import RunArgs, check_minibatches
from utils.runs.launch import check_run, run_script
from utils.runs.run import Run
from utils.world_model import gradient_penalty, penalizes_gradients, scale_gradient, transition_loss


@dataclass
class Args(WorldModelArgs, NetworkArgs, MonitorArgs, RunArgs):
    """Train DeepMDP."""

    # rollout
    num_envs: Annotated[Count, BY_FAMILY] = 128
    """number of parallel environments (B)"""
    num_steps: Annotated[Count, BY_FAMILY] = 8
    """steps per environment in each rollout (T)"""
    # world model
    transition_loss_coef: NotNegative = 5e-4
    """c_P: weight of the transition loss"""
    reward_loss_coef: NotNegative = 0.01
    """c_R: weight of the reward loss"""
    # optimization
    learning_rate: Annotated[Positive, BY_FAMILY] = 2.5e-4
    """learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to 0 over the run"""
    update_epochs: Annotated[Count, BY_FAMILY] = 4
    """epochs over the rollout per update"""
    num_minibatches: Annotated[Count, BY_FAMILY] = 4
    """minibatches per epoch"""
    minibatch_by: Annotated[Literal["env", "transition"], BY_FAMILY] = "env"
    """unit of shuffling. env: all T steps of an environment, so a world model needs each frame encoded once, not twice.
    transition: single transitions; better for few environments and many steps"""
    max_grad_norm: Positive = 0.5
    """clip the global norm of the gradient to this"""
    adam_eps: Positive = 1e-5
    """epsilon of Adam; gradients below it barely change the parameters"""
    # loss
    gamma: Annotated[Share, BY_FAMILY] = 0.99
    """discount factor"""
    gae_lambda: Annotated[Share, BY_FAMILY] = 0.95
    """lambda of generalized advantage estimation"""
    norm_adv: bool = True
    """normalize the advantages in each minibatch"""
    clip_coef: Annotated[InsideUnit, BY_FAMILY] = 0.1
    """eps: clip the probability ratio to [1 - eps, 1 + eps]"""
    clip_vloss: bool = False
    """also clip the value's change to [-eps, eps]"""
    use_huber: bool = False
    """use the Huber loss instead of the squared error for the value"""
    ent_coef: NotNegative = 0.01
    """weight of the entropy bonus"""
    vf_coef: NotNegative = 0.5
    """weight of the value loss"""
    target_kl: Positive | None = None
    """skip the remaining minibatches of an update once the approximate KL divergence exceeds this"""
    enforce_neighborhood: Literal["none", "early_stop", "backtrack"] = "none"
    """what to do when any action's ratio leaves [1 - eps, 1 + eps], which clipping does not prevent. early_stop: skip the rest
    of the update (ratios may stay outside). backtrack: move the parameters back until all ratios in the rollout are inside"""

    def check(self) -> None:
        """Raise UsageError if flags contradict each other. `check_flags` has already checked each flag by itself."""
        check_minibatches(self)


class Agent(NamedTuple):
    """The networks, without their parameters."""

    encoder: nn.Module
    actor_critic: nn.Module
    transition: nn.Module
    reward: nn.Module


class Params(NamedTuple):
    """The parameters of each network in `Agent`, under the same field name."""

    encoder: Any
    actor_critic: Any
    transition: Any
    reward: Any


class Rollout(NamedTuple):
    """T steps of B environments.

    Step t takes `action[t]` in `obs[t]` and leads to `obs[t + 1]`, which is the terminal observation if the episode ends there.
    Index t of the other fields belongs to this step. `valid[t]` is False for a reset step: `obs[t]` is a terminal observation,
    so the environment ignores the action and starts a new episode.
    """

    obs: Num[Array, "T+1 B *obs"] | Stacks
    value: Float[Array, "T+1 B"]
    action: Int[Array, "T B"]
    log_probs: Float[Array, "T B A"]  # of all actions
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]
    episode: EpisodeStats  # [T, B]
    unseen_end: Bool[Array, "T B"]  # the step ended an episode and reset: `obs[t + 1]` does not follow from it


class Minibatch(NamedTuple):
    """N transitions: N / S sequences of S consecutive steps, time-major. Transition n leads to `obs[n + N / S]`."""

    obs: Num[Array, "N+N/S *obs"]
    action: Int[Array, " N"]
    log_probs: Float[Array, "N A"]
    value: Float[Array, " N"]
    advantage: Float[Array, " N"]
    target: Float[Array, " N"]
    reward: Float[Array, " N"]
    valid: Bool[Array, " N"]
    unseen_end: Bool[Array, " N"]


class TrainState(NamedTuple):
    """Everything that changes during training."""

    params: Params
    opt_state: optax.OptState
    env_state: Any
    obs: Num[Array, "B *obs"]
    key: jax.Array
    iteration: Int[Scalar, ""]


def make_agent(args: Args, num_actions: int, obs_parts: tuple[Part, ...] | None = None) -> Agent:
    """Build the networks that the flags select."""
    transition, reward = make_world_model(args, num_actions)
    return Agent(
        encoder=make_encoder(args, obs_parts),
        actor_critic=make_actor_critic(args, num_actions, obs_parts),
        transition=transition,
        reward=reward,
    )


def init_params(key: jax.Array, agent: Agent, obs: Num[Array, "B *obs"]) -> Params:
    """Return random parameters. Each network has its own key, so all scripts start from the same encoder, actor and critic."""
    key_of = partial(jax.random.fold_in, key)
    z, encoder = agent.encoder.init_with_output(key_of(0), obs[:1])
    action = jnp.zeros(1, jnp.int32)
    return Params(
        encoder=encoder,
        actor_critic=agent.actor_critic.init(key_of(1), z, obs[:1]),
        transition=agent.transition.init(key_of(2), z, action),
        reward=agent.reward.init(key_of(3), z, action),
    )


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Return Adam with gradient clipping. `update` applies the learning rate, because it depends on the run's progress."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=args.adam_eps))


def rollout(state: TrainState, env: Env, agent: Agent, args: Args) -> tuple[TrainState, Rollout]:
    """Take T steps in each environment with the current policy. This is jitted separately from `learn`, because a program that
    contains emulators is compiled again in every process."""

    def policy(obs):
        return agent.actor_critic.apply(state.params.actor_critic, agent.encoder.apply(state.params.encoder, obs), obs)

    def act(obs, key):
        logits, value = policy(obs)
        return jax.random.categorical(key, logits), (value, jax.nn.log_softmax(logits))

    key, act_key = jax.random.split(state.key)
    keys = jax.random.split(act_key, args.num_steps)
    env_state, obs, (all_obs, action, (value, log_probs), after) = scan_steps(act, env, state.env_state, state.obs, keys)
    value = jnp.concatenate([value, policy(obs)[1][None]])
    steps = after._asdict() | {"obs": all_obs, "value": value, "action": action, "log_probs": log_probs}
    return state._replace(env_state=env_state, obs=obs, key=key), Rollout(**steps)


def compute_gae(steps: Rollout, gamma: float, gae_lambda: float) -> Float[Array, "T B"]:
    """Return generalized advantage estimates (Schulman et al., 2016, equation 16), which are 0 at reset steps.

    A terminated step does not bootstrap. A truncated step bootstraps from the value of its terminal observation.
    Neither uses anything after the end of the episode, because a reset step follows.
    """

    def backwards(next_advantage, step):
        delta, done, valid = step
        advantage = jnp.where(valid, delta + gamma * gae_lambda * (1.0 - done) * next_advantage, 0.0)
        return advantage, advantage

    delta = steps.reward + gamma * (1.0 - steps.terminated) * steps.value[1:] - steps.value[:-1]
    done = steps.terminated | steps.truncated
    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(delta[0]), (delta, done, steps.valid), reverse=True)
    return advantages


def loss_fn(
    params: Params, batch: Minibatch, key: jax.Array, agent: Agent, args: Args
) -> tuple[Float[Scalar, ""], dict[str, Scalar]]:
    """Return DeepMDP's loss on a minibatch, and its metrics. `key` samples the next latents."""
    n = batch.action.shape[0]
    mean = partial(masked_mean, valid=batch.valid)
    z = agent.encoder.apply(params.encoder, batch.obs)
    z, next_z = z[:n], z[-n:]
    logits, value = agent.actor_critic.apply(params.actor_critic, z, batch.obs[:n])

    log_probs = jax.nn.log_softmax(logits)
    # of all actions; masked before exp, because an overflow turns even a masked gradient into NaN
    log_ratios = jnp.where(batch.valid[:, None], log_probs - batch.log_probs, 0.0)
    log_ratio = jnp.take_along_axis(log_ratios, batch.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    advantage = masked_normalize(batch.advantage, batch.valid) if args.norm_adv else batch.advantage

    # No gradient is stopped: the losses train both networks, and the encoder through z and z'.
    z, next_z = (scale_gradient(x, args.encoder_gradient) for x in (z, next_z))  # unless --encoder-gradient is below 1
    predict_z = partial(agent.transition.apply, params.transition, action=batch.action)
    predict_reward = partial(agent.reward.apply, params.reward, action=batch.action)
    seen = batch.valid & ~batch.unseen_end  # where the next observation is known
    transition_losses = jnp.where(seen, transition_loss(predict_z(z), next_z, key, args), 0.0)
    reward_losses = smooth_l1_loss(predict_reward(z) - batch.reward)
    model_metrics = {"losses/transition_loss": masked_mean(transition_losses, seen), "losses/reward_loss": mean(reward_losses)}
    model_metrics["losses/weighted_transition_loss"] = args.transition_loss_coef * model_metrics["losses/transition_loss"]
    model_metrics["losses/weighted_reward_loss"] = args.reward_loss_coef * model_metrics["losses/reward_loss"]
    policy_loss = mean(jnp.maximum(-advantage * ratio, -advantage * clipped_ratio))
    entropy = mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))

    value_error = smooth_l1_loss if args.use_huber else lambda error: 0.5 * error**2
    value_losses = value_error(value - batch.target)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        value_losses = jnp.maximum(value_losses, value_error(clipped_value - batch.target))
    value_loss = mean(value_losses)

    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    loss = loss + model_metrics["losses/weighted_reward_loss"] + model_metrics["losses/weighted_transition_loss"]
    if penalizes_gradients(args):
        penalty_key = jax.random.fold_in(key, 1)
        penalty = mean(sum(gradient_penalty(f, z, penalty_key, args.use_wgan_gp) for f in (predict_z, predict_reward)))
        loss = loss + args.lambda_gp * penalty
        model_metrics["losses/gradient_penalty"] = penalty
    clipped = (ratio != clipped_ratio).astype(jnp.float32)
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": mean(ratio - 1 - log_ratio),
        "losses/clipfrac": mean(clipped),
    } | ratio_metrics(log_ratios, batch.valid, args.clip_coef) | model_metrics


def minibatch_indices(key: jax.Array, args: Args) -> tuple[Int[Array, "K R"], Int[Array, "K R"]]:
    """Return the first step and the environment of each of the R sequences in each of an update's K minibatches. Every epoch
    shuffles again. A sequence has T steps with `--minibatch-by env`, and one step with `--minibatch-by transition`."""
    runs = args.num_envs * (args.num_steps if args.minibatch_by == "transition" else 1)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, runs))(jax.random.split(key, args.update_epochs))
    shuffled = shuffled.reshape(args.update_epochs * args.num_minibatches, -1)
    return shuffled // args.num_envs, shuffled % args.num_envs


def gather(
    steps: Rollout, advantages: Float[Array, "T B"], first: Int[Array, " R"], env: Int[Array, " R"], args: Args
) -> Minibatch:
    """Return the minibatch of the sequences that start at the steps `first` in the environments `env`."""
    length = 1 if args.minibatch_by == "transition" else args.num_steps

    def where(length):
        t = first + jnp.arange(length)[:, None]
        return by_device((t.reshape(-1), jnp.broadcast_to(env, t.shape).reshape(-1)))

    taken = where(length)
    return Minibatch(
        obs=jax.lax.optimization_barrier(steps.obs[where(length + 1)]),  # otherwise XLA looks up the frame for each pixel
        action=steps.action[taken],
        log_probs=steps.log_probs[taken],
        value=steps.value[taken],
        advantage=advantages[taken],
        target=advantages[taken] + steps.value[taken],
        reward=steps.reward[taken],
        valid=steps.valid[taken],
        unseen_end=steps.unseen_end[taken],
    )


def update(
    state: TrainState,
    steps: Rollout,
    advantages: Float[Array, "T B"],
    key: jax.Array,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    args: Args,
) -> tuple[TrainState, dict[str, Scalar]]:
    """Run all epochs of minibatch gradient steps on one rollout. Return the new state and the metrics."""
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    fraction_left = 1.0 - state.iteration / num_iterations if args.anneal_lr else 1.0
    learning_rate = args.learning_rate * fraction_left

    everywhere = on_each_device((steps, advantages))  # copied once: a minibatch needs steps from all devices

    def minibatch_step(carry, minibatch):
        params, opt_state = carry
        first, env, key = minibatch
        batch = gather(*everywhere, first, env, args)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch, key, agent, args)
        metrics |= track_gradients(grads, state.iteration, args)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -learning_rate * u, updates))
        return (params, opt_state), metrics

    shuffle_key, loss_key = jax.random.split(key)
    first, env = minibatch_indices(shuffle_key, args)
    minibatches = first, env, jax.random.split(loss_key, first.shape[0])
    (params, opt_state), metrics, ran = gradient_steps(minibatch_step, (state.params, state.opt_state), minibatches, args)
    metrics = summarize(metrics, ran, args.num_minibatches) | {"charts/learning_rate": jnp.asarray(learning_rate)}
    if args.enforce_neighborhood == "backtrack":
        moved = partial(policy_change, steps=steps, agent=agent)
        # even a tiny encoder step can flip a categorical latent; the second target keeps the old encoder
        targets = (params, params._replace(encoder=state.params.encoder))
        params, measured = backtrack(state.params, targets, moved, steps.valid, args.clip_coef)
        metrics = metrics | measured
    return state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1), metrics


def policy_change(params: Params, steps: Rollout, agent: Agent) -> Float[Array, "T B A"]:
    """Return log pi'(a|s) - log pi(a|s) of all actions, 0 at reset steps; pi' has `params`, pi collected the rollout."""

    def log_probs(t):  # step by step, as in a rollout without --overlap-rollout: an unchanged policy has ratios of exactly 1
        obs = steps.obs[t]
        logits, _ = agent.actor_critic.apply(params.actor_critic, agent.encoder.apply(params.encoder, obs), obs)
        return jax.nn.log_softmax(logits)

    log_probs = jax.lax.map(log_probs, jnp.arange(len(steps.valid)))
    return jnp.where(steps.valid[..., None], log_probs - steps.log_probs, 0.0)


def learn(
    state: TrainState, steps: Rollout, env: Env, agent: Agent, optimizer: optax.GradientTransformation, args: Args
) -> tuple[TrainState, dict[str, Scalar]]:
    """Update on a rollout. Return the new state and all metrics. Jitted separately from `rollout`, to be cached on disk."""
    key, update_key = jax.random.split(state.key)
    old_params = state.params
    advantages = compute_gae(steps, args.gamma, args.gae_lambda)
    state, metrics = update(state._replace(key=key), steps, advantages, update_key, agent, optimizer, args)
    if args.monitor_guarantee:
        log_ratios = partial(policy_change, state.params, steps, agent)
        draw = jax.random.fold_in(update_key, 2)
        metrics |= monitor_occasionally(state, agent, old_params, steps, log_ratios, draw, args, env.reward_range)
    return state, metrics | rollout_metrics(state.params, steps, advantages, env, agent)


def init_state(args: Args, env: Env, agent: Agent, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first iteration."""
    init_key, key = jax.random.split(jax.random.key(args.seed))
    env_state, obs = env.reset()
    params = jax.jit(init_params, static_argnums=1)(init_key, agent, obs)
    return TrainState(params, jax.jit(optimizer.init)(params), env_state, obs, key, jnp.zeros((), jnp.int32))


def main(args: Args) -> None:
    """Train, log and save."""
    check_run(args)
    run = Run(args, "deep_mdp", args.num_envs * args.num_steps)
    env = make_env(args, run.iteration)
    agent = make_agent(args, env.num_actions, env.obs_parts)
    optimizer = make_optimizer(args)
    jit = partial(jax.jit, donate_argnums=0)
    act = jit(partial(rollout, env=env, agent=agent, args=args))
    improve = jit(partial(learn, env=env, agent=agent, optimizer=optimizer, args=args))
    with run:
        state = run.restore(init_state(args, env, agent, optimizer), env, agent)
        for _ in range(run.iteration, run.num_iterations):
            state, metrics = improve(*act(state))
            run.log(state, metrics)


if __name__ == "__main__":
    run_script(main, Args)
