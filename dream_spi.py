"""DreamSPI on envpool's Atari: a policy that learns in Deep SPI's world model (Delgrange et al., 2026, arXiv 2510.12312).

    python dream_spi.py --env-id=Breakout-v5

On real data, Deep SPI's loss trains the encoder and the world model, together with a network that predicts the end of an
episode. Actor and critic learn by PPO in dreams: from each latent of real data, the policy acts in the world model for a few
steps. This script contains what DreamSPI adds, and imports the rest from `deep_spi.py`.

Read from top to bottom: flags, records, dreaming, advantages, losses, updates, main.
Shapes: T steps x B environments, H steps x M dreams; a minibatch has N transitions.
"""

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()  # Ctrl-C during the remaining imports leaves no traceback

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, Scalar

import deep_spi
from deep_spi import Minibatch, Rollout, compute_gae, gather, minibatch_indices, rollout
from envs.observations import Part
from envs.protocol import Env
from envs.registry import make_env
from networks.architectures import to_range
from networks.discriminator import make_discriminator
from networks.flags import CONTINUOUS, PENALIZED, DensityFlag
from networks.world_models import make_end_predictor
from utils.devices import by_device, on_each_device
from utils.dreams import replay, traces
from utils.dreams.discriminator import DiscriminatorArgs, transition_distance, update_discriminator
from utils.dreams.ends import EndArgs, check_ends, end_logit, end_losses
from utils.dreams.optimizers import DreamOptimizerArgs, Optimizers, descend, learning_rates, make_optimizer
from utils.dreams.traces import DreamTraceArgs, trace_dreams
from utils.histograms import track_gradients
from utils.losses import decayed_sums, masked_mean, masked_normalize, smooth_l1_loss, weighted_mean, weighted_quantiles
from utils.metrics import rollout_metrics, scan_with_metrics, summarize
from utils.occasionally import occasionally
from utils.runs.flag_types import Count, Default, InsideUnit, Needs, NotNegative, Positive, Range, Sizes, at_least
from utils.runs.flags import refuse_unread, require
from utils.runs.launch import check_run, run_script
from utils.runs.run import Run
from utils.world_model import scale_gradient


@dataclass
class Args(replay.ReplayArgs, EndArgs, DiscriminatorArgs, DreamTraceArgs, DreamOptimizerArgs, deep_spi.Args):
    """Train DreamSPI. Some of Deep SPI's flags have other defaults here. --learning-rate applies to the encoder and the world
    model, and --drift-formulation only to the loss on real data."""

    num_minibatches: Annotated[Count, Default(minatar=32)] = 8
    adam_eps: Positive = 1e-8
    ent_coef: Annotated[NotNegative, Default(atari=0.1)] = 0.01
    transition_loss_coef: NotNegative = 1e-2
    reward_loss_coef: NotNegative = 0.1
    model_clip_coef: InsideUnit | None = None
    """eps of the loss on real data, which trains encoder and world model (default: --clip-coef, which is the eps in dreams)"""
    transition_density: DensityFlag = "deterministic"
    transition_layers: Annotated[Sizes, CONTINUOUS, Default(minatar=(512, 512))] = (64, 64)
    lipschitz_nets: Annotated[bool, CONTINUOUS] = False
    lambda_gp: Annotated[NotNegative, CONTINUOUS, PENALIZED] = 0.0
    decoupled_repr: bool = False
    value_aware_coef: NotNegative = 1.0
    """weight of the value-aware loss (Farahmand et al., 2017): half the squared difference between the critic's values of the
    predicted and the real next latent, except at terminations. Only the transition network learns from it"""
    # dreams
    dreams_from: Annotated[Literal["rollout", "replay"], Needs(use_replay_buffer=True)] = "rollout"
    """where dreams start. rollout: at all latents of the rollout, after the world model's update. replay: at the latents of
    each replayed minibatch, after each gradient step of the world model"""
    imagination_horizon: Count = 3
    """steps per dream (H)"""
    n_imagination_rollouts: Annotated[Count, Needs(dreams_from="rollout")] = 1
    """rounds of dreams per update; each round dreams from all latents of the rollout, then trains the policy"""
    imagination_epochs: Count = 4
    """epochs over the dreams of each round"""
    dream_minibatches: Annotated[Count, Default(minatar=8)] = 4
    """minibatches per epoch in dreams"""
    actor_after: Annotated[int, at_least(0), Default(atari=60_000)] = 0
    """environment steps during which dreamed advantages are 0, so that the actor waits for the model"""
    bounded_dreams: bool = True
    """clip predicted latents to the range of the encoder's activation, predicted rewards to the environment's range, and
    values in dreams to the range of possible returns"""
    real_value_coef: NotNegative = 3.0
    """weight of the critic's loss on real returns where dreams start, relative to its loss in dreams (Hafner et al., 2023)"""
    slow_critic: Annotated[float, Range(lambda x: 0 <= x < 1, "must lie in [0, 1)"), Needs(clip_vloss=False)] = 0.0
    """decay of a moving average of the critic, updated after each round of dreams, that estimates the values in dreams; 0: use
    the critic itself"""
    norm_returns: bool = False
    """divide dreamed advantages by the range from the 5th to the 95th percentile of dreamed returns, if that exceeds 1 (Hafner
    et al., 2023); replaces --norm-adv in dreams"""
    soft_done: bool = False
    """weight each step of a dream by the predicted probability of reaching it, instead of sampling when the episode ends"""
    # real data for actor and critic
    dyna_style: bool = False
    """also train actor and critic on real data"""
    progressive: Literal["none", "linear", "exponential", "late"] = "none"
    """at progress p (0 to 1), dreams get this fraction of the learning rate of actor and critic, real data the rest. linear: p;
    exponential: (1 - 0.01^p) / 0.99; late: 1e-8^(1 - p). --anneal-heads-lr lowers both"""

    def check(self) -> None:
        """Raise UsageError if flags contradict each other or have no effect here."""
        said = f"--dyna-style: --progressive {self.progressive} already trains actor and critic on real data; drop one"
        require(not self.dyna_style or self.progressive == "none", said)
        said = "--decoupled-repr: dreams have no observations for the critic's own encoder; use --decoupled-layers"
        require(not self.decoupled_repr, said)
        starts = self.replay_batch_size * self.replay_length if self.dreams_from == "replay" else self.num_envs * self.num_steps
        steps, parts = starts * self.imagination_horizon, self.dream_minibatches * self.num_devices
        said = f"--dream-minibatches {self.dream_minibatches}: {steps} dreamed steps do not divide into {parts} equal parts"
        said += f" (--num-devices {self.num_devices})" if self.num_devices > 1 else ""
        require(steps % parts == 0, f"{said}; choose another number")
        said = f"--dream-minibatches {self.dream_minibatches}: one dreamed step each, whose normalized advantage is always 0"
        one = steps == self.dream_minibatches and self.norm_adv and not self.norm_returns
        require(not one, f"{said}; use fewer, or --no-norm-adv")
        refuse_unread(self, ("monitor_guarantee", "enforce_neighborhood", "target_kl"), "deep_spi.py")


class Agent(NamedTuple):
    """The networks, without their parameters, and the range of dreamed rewards."""

    encoder: nn.Module
    actor_critic: nn.Module
    transition: nn.Module
    reward: nn.Module
    end: nn.Module
    discriminator: nn.Module | None
    slow_critic: bool = False  # True with --slow-critic
    reward_range: tuple[float, float] = (-math.inf, math.inf)  # the environment's; `learn` sets it


class Params(NamedTuple):
    """The parameters of each network in `Agent`, under the same field name, and of the slow critic (`--slow-critic`)."""

    encoder: Any
    actor_critic: Any
    transition: Any
    reward: Any
    end: Any
    discriminator: Any
    slow_critic: Any = None


class Dreams(NamedTuple):
    """H steps of M dreams, indexed as in `Rollout`: `z[t + 1]` follows `action[t]` in `z[t]`.

    `going_on[t]` is 1 if the dream continues after step t, else 0. `weight[t]` is 1 if the dream reached step t, and 0
    after its end or if it never started. With `--soft-done` both are probabilities.
    """

    z: Float[Array, "H M *z"]
    value: Float[Array, "H+1 M"]
    action: Int[Array, "H M"]
    log_prob: Float[Array, "H M"]
    reward: Float[Array, "H M"]
    going_on: Float[Array, "H M"]
    weight: Float[Array, "H M"]


class HeadsBatch(NamedTuple):
    """N steps of dreams, to train actor and critic."""

    z: Float[Array, "N *z"]
    action: Int[Array, " N"]
    log_prob: Float[Array, " N"]
    value: Float[Array, " N"]
    advantage: Float[Array, " N"]
    target: Float[Array, " N"]
    weight: Float[Array, " N"]
    real_target: Float[Array, " N"]  # the return in real data
    real_weight: Float[Array, " N"]  # 1 at latents of real data, 0 at dreamed ones


class TrainState(NamedTuple):
    """Everything that changes during training."""

    params: Params
    opt_state: Optimizers
    env_state: Any
    obs: Num[Array, "B *obs"]
    replay: Any
    key: jax.Array
    iteration: Int[Scalar, ""]


def make_agent(args: Args, num_actions: int, obs_parts: tuple[Part, ...] | None = None) -> Agent:
    """Build the networks that the flags select."""
    others = make_end_predictor(args, num_actions), make_discriminator(args, num_actions)
    return Agent(*deep_spi.make_agent(args, num_actions, obs_parts), *others, slow_critic=args.slow_critic > 0)


def init_params(key: jax.Array, agent: Agent, obs: Num[Array, "B *obs"]) -> Params:
    """Return random parameters, including those that `deep_spi.py` draws from the same key."""
    params = deep_spi.init_params(key, agent, obs)
    z, action = agent.encoder.apply(params.encoder, obs[:1]), jnp.zeros(1, jnp.int32)
    end = agent.end.init(jax.random.fold_in(key, 4), z, action)
    discriminator = agent.discriminator and agent.discriminator.init(jax.random.fold_in(key, 5), z, action, z)
    slow_critic = jax.tree.map(jnp.copy, params.actor_critic) if agent.slow_critic else None
    return Params(*params, end, discriminator, slow_critic)


def dream_step(
    params: Params, z: Float[Array, "M *z"], action: Int[Array, " M"], key: jax.Array, agent: Agent, args: Args
) -> tuple[Float[Array, "M *z"], Float[Array, " M"], Float[Array, " M"]]:
    """Take a step in the world model. Return the next latent, the reward, and the probability that the episode ends there."""
    reward = agent.reward.apply(params.reward, z, action)
    next_z = agent.transition.apply(params.transition, z, action).sample(key)
    if args.bounded_dreams:
        reward, next_z = jnp.clip(reward, *agent.reward_range), to_range(next_z, args)
    return next_z, reward, nn.sigmoid(end_logit(params, z, action, next_z, agent, args))


def imagine(
    params: Params, z: Float[Array, "M *z"], awake: Float[Array, " M"], key: jax.Array, agent: Agent, args: Args
) -> Dreams:
    """Act in the world model for H steps, from each latent where `awake` is 1. No gradient flows through a dream.

    With `--bounded-dreams`, `agent.reward_range` bounds rewards and values. A loaded agent needs the environment's:
    `agent._replace(reward_range=env.reward_range)`.
    """
    params, z = jax.lax.stop_gradient((params, z))
    low, high = agent.reward_range  # the value range includes 0, because episodes end
    value_range = jnp.asarray([min(low, 0.0), max(high, 0.0)]) / max(1.0 - args.gamma, 1e-8)

    def policy(z):
        logits, value = agent.actor_critic.apply(params.actor_critic, z)
        if args.slow_critic:
            value = agent.actor_critic.apply(params.slow_critic, z)[1]
        return logits, jnp.clip(value, *value_range) if args.bounded_dreams else value

    def step(carry, key):
        z, weight = carry
        action_key, end_key, z_key = jax.random.split(key, 3)
        logits, value = policy(z)
        action = jax.random.categorical(action_key, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        next_z, reward, ends = dream_step(params, z, action, z_key, agent, args)
        going_on = 1.0 - ends
        if not args.soft_done:
            going_on = jax.random.bernoulli(end_key, going_on).astype(jnp.float32)
        return (next_z, weight * going_on), (z, value, action, log_prob, reward, going_on, weight)

    (z, _), dreams = jax.lax.scan(step, (z, awake), jax.random.split(key, args.imagination_horizon))
    dreams = Dreams(*dreams)
    return dreams._replace(value=jnp.concatenate([dreams.value, policy(z)[1][None]]))


def dream_advantages(dreams: Dreams, gamma: float, gae_lambda: float) -> Float[Array, "H M"]:
    """Return generalized advantage estimates, with `going_on` instead of (1 - done). They bootstrap from the last value."""
    error = dreams.reward + gamma * dreams.going_on * dreams.value[1:] - dreams.value[:-1]
    return decayed_sums(error, gamma * gae_lambda * dreams.going_on)


def model_loss(
    params: Params, batch: Minibatch, ended: Bool[Array, " N"], weight: Float[Array, " N"] | float, key: jax.Array,
    agent: Agent, args: Args,
) -> tuple[Float[Scalar, ""], dict[str, Scalar]]:  # fmt: skip
    """Return the loss on real data (Deep SPI's combined with the end predictor's and the value-aware loss) and its metrics."""
    args = replace(args, clip_coef=args.model_clip_coef or args.clip_coef)
    n = batch.action.shape[0]
    z = agent.encoder.apply(params.encoder, batch.obs)
    z, next_z = jax.lax.stop_gradient(z[:n]), scale_gradient(z[-n:], args.encoder_gradient)
    distance = transition_distance(agent.discriminator, params.discriminator, z, batch.action)
    losses = end_losses(end_logit(params, z, batch.action, next_z, agent, args), ended, args)
    end_loss = masked_mean(losses, batch.valid)
    if args.end_loss == "cross_entropy":
        loss, metrics = deep_spi.loss_fn(params, batch, key, agent, args, distance, weight)
        loss = loss + args.end_loss_coef * end_loss
    else:  # U = A - c_R (l_R + c_E l_E) - c_P l_P
        advantage = masked_normalize(batch.advantage, batch.valid) if args.norm_adv else batch.advantage
        losses = args.end_loss_coef * (losses if args.piecewise_auxiliary_ratio else end_loss)
        batch = batch._replace(advantage=advantage - args.reward_loss_coef * losses)
        loss, metrics = deep_spi.loss_fn(params, batch, key, agent, replace(args, norm_adv=False), distance, weight)
    if args.value_aware_coef:
        critic = partial(agent.actor_critic.apply, jax.lax.stop_gradient(params.actor_critic))
        predicted_z, *_ = dream_step(params, z, batch.action, key, agent, args)
        errors = critic(predicted_z)[1] - critic(jax.lax.stop_gradient(next_z))[1]
        metrics["losses/value_aware_loss"] = 0.5 * masked_mean(errors**2, batch.valid & ~ended)
        loss = loss + args.value_aware_coef * metrics["losses/value_aware_loss"]
    return loss, metrics | {"losses/end_loss": end_loss}


def heads_loss(params: Params, batch: HeadsBatch, agent: Agent, args: Args) -> tuple[Float[Scalar, ""], dict[str, Scalar]]:
    """Return PPO's loss on dreamed steps, each counted by its `weight`, and its metrics."""
    mean = partial(weighted_mean, weight=batch.weight)
    logits, value = agent.actor_critic.apply(params.actor_critic, batch.z)
    log_probs = jax.nn.log_softmax(logits)
    log_ratio = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0] - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = batch.advantage
    if args.norm_adv and not args.norm_returns:
        advantage = advantage - mean(advantage)
        advantage = advantage / (jnp.sqrt(mean(advantage**2)) + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = mean(jnp.maximum(-advantage * ratio, -advantage * clipped_ratio))
    entropy = mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
    value_error = smooth_l1_loss if args.use_huber else lambda error: 0.5 * error**2
    value_losses = value_error(value - batch.target)
    if args.clip_vloss:
        change = jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        value_losses = jnp.maximum(value_losses, value_error(batch.value + change - batch.target))
    value_loss = mean(value_losses)
    real_value_loss = weighted_mean(value_error(value - batch.real_target), batch.real_weight)
    critic_loss = value_loss + args.real_value_coef * real_value_loss
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * critic_loss
    return loss, {
        "dreams/policy_loss": policy_loss,
        "dreams/value_loss": value_loss,
        "dreams/real_value_loss": real_value_loss,
        "dreams/entropy": entropy,
        "dreams/approx_kl": mean(ratio - 1 - log_ratio),
    }


def dream_and_learn(
    params: Params, opt_state: Optimizers, z: Float[Array, "M *z"], awake: Float[Array, " M"], target: Float[Array, " M"],
    key: jax.Array, iteration: Int[Scalar, ""], agent: Agent, optimizers: Optimizers, args: Args,
) -> tuple[tuple[Params, Optimizers], dict[str, Scalar]]:  # fmt: skip
    """Dream from each latent where `awake` is 1, then run all minibatch gradient steps of actor and critic on these dreams. The
    critic also learns `target`, the real return of each latent."""
    rates = learning_rates(iteration, args)
    dream_key, shuffle_key = jax.random.split(key)
    dreams = imagine(params, z, awake, dream_key, agent, args)
    advantages, value = dream_advantages(dreams, args.gamma, args.gae_lambda), dreams.value[:-1]
    returns = value + advantages
    advantages = jnp.where(iteration < args.actor_after / (args.num_envs * args.num_steps), 0.0, advantages)
    if args.norm_returns:
        low, high = weighted_quantiles(returns, dreams.weight, (0.05, 0.95))
        advantages = advantages / jnp.maximum(high - low, 1.0)
    first = lambda x: jnp.zeros_like(dreams.weight).at[0].set(x)  # noqa: E731
    batch = HeadsBatch(
        dreams.z, dreams.action, dreams.log_prob, value, advantages, returns, dreams.weight, first(target), first(awake)
    )
    batch = on_each_device(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch))
    keys = jax.random.split(shuffle_key, args.imagination_epochs)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, dreams.weight.size))(keys)
    shuffled = shuffled.reshape(args.imagination_epochs * args.dream_minibatches, -1)

    def minibatch_step(carry, indices):
        minibatch = jax.tree.map(lambda x: x[by_device(indices)], batch)
        grads, metrics = jax.grad(heads_loss, has_aux=True)(carry[0], minibatch, agent, args)
        metrics |= track_gradients(grads, iteration, args, "dreams")
        return descend("heads", grads, rates, *carry, optimizers), metrics

    (params, opt_state), metrics = scan_with_metrics(minibatch_step, (params, opt_state), shuffled)
    if args.slow_critic:
        slow = optax.incremental_update(params.actor_critic, params.slow_critic, 1.0 - args.slow_critic)
        params = params._replace(slow_critic=slow)
    return (params, opt_state), jax.tree.map(partial(jnp.mean, axis=0), metrics) | {
        "dreams/length": jnp.sum(dreams.weight) / jnp.maximum(jnp.sum(awake), 1.0),
        "dreams/reward": weighted_mean(dreams.reward, dreams.weight),
    }


def update_model(
    state: TrainState, steps: Rollout, advantages: Float[Array, "T B"], key: jax.Array, agent: Agent, optimizers: Optimizers,
    args: Args,
) -> tuple[TrainState, dict[str, Scalar]]:  # fmt: skip
    """Run all gradient steps on real data. With `--dyna-style` or `--progressive`, they also train actor and critic. With
    `--dreams-from replay`, actor and critic learn from dreams after each step."""
    rates = learning_rates(state.iteration, args)
    draw_key, loss_key = jax.random.split(key)
    if args.use_replay_buffer:
        draws = jax.random.split(draw_key, replay.replay_updates(args))

        def take(draw, params):
            fields, *others = replay.for_policy(params, replay.sample(state.replay, draw, args), agent, args)
            return by_device(Minibatch(**fields)), *others

    else:
        draws = minibatch_indices(draw_key, args)
        steps, advantages = on_each_device((steps, advantages))  # copied once: a minibatch needs steps from all devices

        def take(draw, _):
            first, env = draw
            length = 1 if args.minibatch_by == "transition" else args.num_steps
            ended = steps.terminated[first + jnp.arange(length)[:, None], env].reshape(-1)
            return gather(steps, advantages, first, env, args), ended, 1.0

    def minibatch_step(carry, drawn):
        draw, key = drawn
        # ratios are relative to the policy before the update or, with --dreams-from replay, the current one
        batch, ended, weight = take(draw, carry[0] if args.dreams_from == "replay" else state.params)
        if args.wasserstein_discriminator:
            carry = update_discriminator(*carry, batch, jax.random.fold_in(key, 2), agent, optimizers, rates, args)
        grads, metrics = jax.grad(model_loss, has_aux=True)(carry[0], batch, ended, weight, key, agent, args)
        metrics |= track_gradients(grads, state.iteration, args)
        carry = descend("model", grads, rates, *carry, optimizers)
        if args.dyna_style or args.progressive != "none":
            carry = descend("real_heads", grads, rates, *carry, optimizers)
        if args.dreams_from == "replay":
            z = agent.encoder.apply(carry[0].encoder, batch.obs)[: batch.action.shape[0]]
            start = z, batch.valid.astype(jnp.float32), batch.target, jax.random.fold_in(key, 3)
            carry, dreamed = dream_and_learn(*carry, *start, state.iteration, agent, optimizers, args)
            metrics |= dreamed
        return carry, metrics

    count = jax.tree.leaves(draws)[0].shape[0]
    drawn = draws, jax.random.split(loss_key, count)
    (params, opt_state), metrics = scan_with_metrics(minibatch_step, (state.params, state.opt_state), drawn)
    last_epoch = count if args.use_replay_buffer else args.num_minibatches
    metrics = summarize(metrics, jnp.ones(count, bool), last_epoch) | {
        "charts/learning_rate": jnp.asarray(rates.model),
        "charts/heads_learning_rate": jnp.asarray(rates.heads),
    }
    return state._replace(params=params, opt_state=opt_state), metrics


def update_heads(
    state: TrainState, steps: Rollout, advantages: Float[Array, "T B"], key: jax.Array, agent: Agent, optimizers: Optimizers,
    args: Args,
) -> tuple[TrainState, dict[str, Scalar]]:  # fmt: skip
    """Run all rounds of dreams from the latents of the rollout. In each round, actor and critic learn from the dreams."""
    z = jax.lax.map(lambda t: agent.encoder.apply(state.params.encoder, steps.obs[t]), jnp.arange(len(steps.valid)))
    z, awake = z.reshape(-1, *z.shape[2:]), steps.valid.reshape(-1).astype(jnp.float32)
    start = by_device((z, awake, (advantages + steps.value[:-1]).reshape(-1)))

    def one_round(carry, key):
        return dream_and_learn(*carry, *start, key, state.iteration, agent, optimizers, args)

    keys = jax.random.split(key, args.n_imagination_rollouts)
    (params, opt_state), metrics = jax.lax.scan(one_round, (state.params, state.opt_state), keys)
    return state._replace(params=params, opt_state=opt_state), jax.tree.map(partial(jnp.mean, axis=0), metrics)


def prefill(state: TrainState, steps: Rollout, env: Env, agent: Agent, args: Args) -> tuple[TrainState, dict[str, Scalar]]:
    """Add a rollout to the replay buffer without learning; replaces `learn` until the buffer is prefilled."""
    state = state._replace(replay=replay.add(state.replay, steps, args), iteration=state.iteration + 1)
    return state, rollout_metrics(state.params, steps, compute_gae(steps, args.gamma, args.gae_lambda), env, agent)


def learn(
    state: TrainState, steps: Rollout, env: Env, agent: Agent, optimizers: Optimizers, args: Args
) -> tuple[TrainState, dict[str, Scalar]]:
    """Run all updates on a rollout. Return the new state and the metrics."""
    agent = agent._replace(reward_range=env.reward_range)
    key, model_key, heads_key, trace_key = jax.random.split(state.key, 4)
    old_params, advantages = state.params, compute_gae(steps, args.gamma, args.gae_lambda)
    state = state._replace(replay=replay.add(state.replay, steps, args), key=key)
    state, metrics = update_model(state, steps, advantages, model_key, agent, optimizers, args)
    if args.dreams_from == "rollout":
        state, dream_metrics = update_heads(state, steps, advantages, heads_key, agent, optimizers, args)
        metrics |= dream_metrics
    metrics |= rollout_metrics(state.params, steps, advantages, env, agent)
    if args.log_dreams:  # by the model before it learned from this rollout
        trace = partial(trace_dreams, old_params, steps, trace_key, agent, args, dream_step)
        learned = state.iteration - replay.prefill_iterations(args)
        metrics = metrics | occasionally(learned, args.log_dreams_every, trace, traces.PREFIX)
    return state._replace(iteration=state.iteration + 1), metrics


def init_state(args: Args, env: Env, agent: Agent, optimizers: Optimizers) -> TrainState:
    """Return the state before the first iteration."""
    init_key, key = jax.random.split(jax.random.key(args.seed))
    env_state, obs = env.reset()
    params = jax.jit(init_params, static_argnums=1)(init_key, agent, obs)
    opt_state = jax.jit(lambda params: Optimizers(*(optimizer.init(params) for optimizer in optimizers)))(params)
    return TrainState(params, opt_state, env_state, obs, replay.init_replay(env, args), key, jnp.zeros((), jnp.int32))


def main(args: Args) -> None:
    """Train, log and save."""
    check_run(args)
    run = Run(args, "dream_spi", args.num_envs * args.num_steps)
    env = make_env(args, run.iteration)
    check_ends(env, args)
    replay.check_memory(env, args)
    agent = make_agent(args, env.num_actions, env.obs_parts)
    optimizers = make_optimizer(args)
    jit = partial(jax.jit, donate_argnums=0)
    act = jit(partial(rollout, env=env, agent=agent, args=args))
    fill = jit(partial(prefill, env=env, agent=agent, args=args))
    improve = jit(partial(learn, env=env, agent=agent, optimizers=optimizers, args=args))
    with run:
        state = run.restore(init_state(args, env, agent, optimizers), env, agent)
        state = replay.refill(state, lambda state: fill(*act(state)), run.iteration, env, args)
        for k in range(run.iteration, run.num_iterations):
            state, metrics = (fill if k < replay.prefill_iterations(args) else improve)(*act(state))
            run.log(state, metrics)


if __name__ == "__main__":
    run_script(main, Args)
