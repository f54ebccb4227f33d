"""DreamSPI on envpool's Atari: a policy that learns in Deep SPI's world model (Delgrange et al., 2026, arXiv 2510.12312).

    python dream_spi.py --env-id=Breakout-v5

On real data the loss of Deep SPI trains encoder and world model, and a predictor of ends. Actor and critic learn by PPO in
dreams: from each latent of the rollout the policy acts in the world model for a few steps. Rollout, advantages, minibatches and
the loss on real data are those of `deep_spi.py`, imported from there; here stands what DreamSPI adds.

Read from top to bottom: flags, records, dreaming, advantages, losses, updates, main.
Shapes: T steps x B environments, H steps x M dreams, and N = flattened.
"""

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()  # Ctrl-C while the rest is imported leaves no traceback

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, Scalar

import deep_spi
from deep_spi import Minibatch, Rollout, compute_gae, gather, minibatch_indices, rollout
from envs.protocol import Env
from envs.registry import make_env
from networks.discriminator import make_discriminator
from networks.world_models import make_end_predictor
from utils.dreams import replay, traces
from utils.dreams.discriminator import DiscriminatorArgs, transition_distance
from utils.dreams.traces import DreamTraceArgs, trace_dreams
from utils.histograms import track_gradients
from utils.losses import decayed_sums, masked_mean, smooth_l1_loss, weighted_mean
from utils.metrics import rollout_metrics, summarize
from utils.occasionally import occasionally
from utils.runs.flags import Count, NotNegative, Positive, refuse_unread, require
from utils.runs.launch import check_run, run_script
from utils.runs.run import Run


@dataclass
class Args(replay.ReplayArgs, DiscriminatorArgs, DreamTraceArgs, deep_spi.Args):
    """Flags of the algorithm, besides those of Deep SPI; that one's `learning_rate` is of encoder and world model here, and its
    `drift_formulation` shapes the loss on real data alone."""

    learning_rate: Positive = 2e-4
    """learning rate of AdamW for encoder and world model"""
    weight_decay: NotNegative = 0.01
    """weight decay of AdamW for encoder and world model"""
    end_loss_coef: NotNegative = 1.0
    """weight of the loss of the predictor of ends"""
    # dreams
    heads_learning_rate: Positive = 2.75e-5
    """learning rate of Adam for actor and critic"""
    anneal_heads_lr: bool = True
    """lower that learning rate linearly to 0 over the run"""
    imagination_horizon: Count = 8
    """steps of a dream (H)"""
    n_imagination_rollouts: Count = 1
    """dreams from each latent of the rollout, one after the other, the policy learning in between"""
    imagination_epochs: Count = 4
    """passes over the dreams of one such round"""
    soft_done: bool = False
    """dreams never end, but go on with the predicted probability as a weight; otherwise their ends are drawn"""
    # real data for actor and critic
    dyna_style: bool = False
    """actor and critic learn on real data as well"""
    progressive: Literal["none", "linear", "exponential"] = "none"
    """actor and critic start on real data and move to dreams: the share of their learning rate in dreams rises from 0 to 1 over
    the run, linearly or as 1 - 0.01^progress (besides what --anneal-heads-lr takes off both)"""

    def check(self) -> None:
        """Raises UsageError where flags do not go together, or are of no use here."""
        require(
            not (self.dyna_style and self.progressive != "none"),
            f"--dyna-style: with --progressive {self.progressive} actor and critic learn on real data already; drop one of the "
            "two",
        )
        require(
            not self.decoupled_repr,
            "--decoupled-repr: in dreams there are no observations for an encoder of the critic's own; take --decoupled-layers",
        )
        needed = "deep_spi.py, whose policy learns on real data alone"
        refuse_unread(self, ("monitor_guarantee", "enforce_neighbourhood", "target_kl"), needed)


class Agent(NamedTuple):
    """The networks, without their parameters."""

    encoder: nn.Module
    actor_critic: nn.Module
    transition: nn.Module
    reward: nn.Module
    end: nn.Module
    discriminator: nn.Module | None


class Params(NamedTuple):
    """The parameters of the networks of `Agent`, field by field."""

    encoder: Any
    actor_critic: Any
    transition: Any
    reward: Any
    end: Any
    discriminator: Any


GROUP = Params("model", actor_critic="heads", transition="model", reward="model", end="model", discriminator="discriminator")


class Optimizers(NamedTuple):
    """Optimizers, their states, or their learning rates. Each moves the parameters of one `GROUP` and leaves the others as they
    are, to the bit. Heads have two, so that the moments of what they learn from real data are not those of dreams."""

    model: Any
    heads: Any
    real_heads: Any
    discriminator: Any


class Dreams(NamedTuple):
    """H steps of M dreams, in the convention of `Rollout`: `z[t + 1]` follows `action[t]` in `z[t]`.

    `going_on[t]` is whether (or with `--soft-done` how probably) the dream goes on after step t, and `weight[t]` whether it had
    come to step t at all: what comes after an end counts for nothing.
    """

    z: Float[Array, "H M *z"]
    value: Float[Array, "H+1 M"]
    action: Int[Array, "H M"]
    log_prob: Float[Array, "H M"]
    reward: Float[Array, "H M"]
    going_on: Float[Array, "H M"]
    weight: Float[Array, "H M"]


class HeadsBatch(NamedTuple):
    """N steps of dreams."""

    z: Float[Array, "N *z"]
    action: Int[Array, " N"]
    log_prob: Float[Array, " N"]
    value: Float[Array, " N"]
    advantage: Float[Array, " N"]
    weight: Float[Array, " N"]


class TrainState(NamedTuple):
    """All that changes in training."""

    params: Params
    opt_state: Optimizers
    env_state: Any
    obs: Num[Array, "B *obs"]
    replay: Any
    key: jax.Array
    iteration: Int[Scalar, ""]


def make_agent(args: Args, num_actions: int) -> Agent:
    """The networks that the flags ask for."""
    networks = deep_spi.make_agent(args, num_actions)
    return Agent(*networks, make_end_predictor(args, num_actions), make_discriminator(args, num_actions))


def init_params(key: jax.Array, agent: Agent, obs: Num[Array, "B *obs"]) -> Params:
    """Random parameters, those of `deep_spi.py` for the same key among them."""
    params = deep_spi.init_params(key, agent, obs)
    z, action = agent.encoder.apply(params.encoder, obs[:1]), jnp.zeros(1, jnp.int32)
    end, discriminator = agent.end.init(jax.random.fold_in(key, 4), z, action), None
    if agent.discriminator is not None:
        discriminator = agent.discriminator.init(jax.random.fold_in(key, 5), z, action, z)
    return Params(*params, end=end, discriminator=discriminator)


def make_optimizer(args: Args) -> Optimizers:
    """AdamW for encoder and world model, Adam for the others, each on its group's clipped gradient. Learning rates are applied
    in the updates, which know how far the run is."""
    adam = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=args.adam_eps))
    adamw = optax.chain(adam, optax.add_decayed_weights(args.weight_decay))
    frozen = dict.fromkeys(GROUP, optax.set_to_zero())
    labels = lambda params: Params(*(jax.tree.map(lambda _, g=g: g, p) for g, p in zip(GROUP, params, strict=True)))  # noqa: E731
    of = lambda group, optimizer: optax.partition(frozen | {group: optimizer}, labels)  # noqa: E731
    return Optimizers(of("model", adamw), of("heads", adam), of("heads", adam), of("discriminator", adam))


def imagine(
    params: Params, z: Float[Array, "M *z"], awake: Float[Array, " M"], key: jax.Array, agent: Agent, args: Args
) -> Dreams:
    """Acts in the world model for H steps, from each of the latents (where `awake` is 1). No gradient flows through a dream."""
    params, z = jax.lax.stop_gradient((params, z))

    def step(carry, key):
        z, weight = carry
        action_key, end_key, z_key = jax.random.split(key, 3)
        logits, value = agent.actor_critic.apply(params.actor_critic, z)
        action = jax.random.categorical(action_key, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        reward = agent.reward.apply(params.reward, z, action)
        going_on = 1.0 - nn.sigmoid(agent.end.apply(params.end, z, action))
        if not args.soft_done:
            going_on = jax.random.bernoulli(end_key, going_on).astype(jnp.float32)
        next_z = agent.transition.apply(params.transition, z, action).sample(z_key)
        return (next_z, weight * going_on), (z, value, action, log_prob, reward, going_on, weight)

    (z, _), dreams = jax.lax.scan(step, (z, awake), jax.random.split(key, args.imagination_horizon))
    dreams = Dreams(*dreams)
    _, value = agent.actor_critic.apply(params.actor_critic, z)
    return dreams._replace(value=jnp.concatenate([dreams.value, value[None]]))


def dream_advantages(dreams: Dreams, gamma: float, gae_lambda: float) -> Float[Array, "H M"]:
    """Generalised advantage estimates: `going_on` in the place of (1 - done); the last value stands for the rest."""
    error = dreams.reward + gamma * dreams.going_on * dreams.value[1:] - dreams.value[:-1]
    return decayed_sums(error, gamma * gae_lambda * dreams.going_on)


def replayed_minibatch(
    params: Params, steps: replay.Replayed, agent: Agent, args: Args
) -> tuple[Minibatch, Bool[Array, " N"], Float[Array, " N"]]:
    """Replayed steps as a minibatch for the policy of `params`: with it which of them ended, and how much each counts."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    z = agent.encoder.apply(params.encoder, flat(steps.obs))
    logits, value = agent.actor_critic.apply(params.actor_critic, z)
    value, log_probs = value.reshape(steps.reward.shape), jax.nn.log_softmax(logits).reshape(steps.log_probs.shape)
    taken = jnp.take_along_axis(log_probs - steps.log_probs, steps.action[..., None], axis=-1)[..., 0]
    ratio = jnp.exp(jnp.where(steps.valid, taken, 0.0))
    truncated_ratio = jnp.minimum(ratio, 1.0)
    advantage, target = replay.vtrace(steps, value, truncated_ratio, args.gamma, args.gae_lambda)
    weight = truncated_ratio if args.off_policy == "vtrace" else ratio
    obs, steps = flat(steps.obs), jax.tree.map(lambda x: flat(x[:-1]), steps)
    batch = Minibatch(
        obs=obs,
        action=steps.action,
        log_probs=flat(log_probs[:-1]),
        value=flat(value[:-1]),
        advantage=flat(advantage),
        target=flat(target),
        reward=steps.reward,
        valid=steps.valid,
    )
    return batch, steps.terminated, flat(weight[:-1])


def model_loss(
    params: Params, batch: Minibatch, ended: Bool[Array, " N"], weight: Float[Array, " N"] | float, key: jax.Array,
    agent: Agent, args: Args,
) -> tuple[Float[Scalar, ""], dict[str, Scalar]]:  # fmt: skip
    """Deep SPI's loss on real data, and the cross-entropy of the predictor of ends, whose gradient stops at the latent."""
    z = jax.lax.stop_gradient(agent.encoder.apply(params.encoder, batch.obs)[: batch.action.shape[0]])
    distance = transition_distance(agent.discriminator, params.discriminator, z, batch.action)
    loss, metrics = deep_spi.loss_fn(params, batch, key, agent, args, distance, weight)
    logit = agent.end.apply(params.end, z, batch.action)
    end_loss = masked_mean(optax.sigmoid_binary_cross_entropy(logit, ended.astype(jnp.float32)), batch.valid)
    return loss + args.end_loss_coef * end_loss, metrics | {"losses/end_loss": end_loss}


def heads_loss(params: Params, batch: HeadsBatch, agent: Agent, args: Args) -> tuple[Float[Scalar, ""], dict[str, Scalar]]:
    """PPO's loss in dreams, each step counting by its weight."""
    mean = partial(weighted_mean, weight=batch.weight)
    logits, value = agent.actor_critic.apply(params.actor_critic, batch.z)
    log_probs = jax.nn.log_softmax(logits)
    log_ratio = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0] - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = batch.advantage
    if args.norm_adv:
        advantage = advantage - mean(advantage)
        advantage = advantage / (jnp.sqrt(mean(advantage**2)) + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = mean(jnp.maximum(-advantage * ratio, -advantage * clipped_ratio))
    entropy = mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
    value_error = smooth_l1_loss if args.use_huber else lambda error: 0.5 * error**2
    value_losses = value_error(value - batch.value - batch.advantage)
    if args.clip_vloss:
        change = jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        value_losses = jnp.maximum(value_losses, value_error(change - batch.advantage))
    value_loss = mean(value_losses)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, {
        "dreams/policy_loss": policy_loss,
        "dreams/value_loss": value_loss,
        "dreams/entropy": entropy,
        "dreams/approx_kl": mean(ratio - 1 - log_ratio),
    }


def learning_rates(iteration: Int[Scalar, ""], args: Args) -> Optimizers:
    """Of each optimizer in this iteration."""
    prefill = replay.prefill_iterations(args)
    progress = (iteration - prefill) / (args.total_timesteps // (args.num_envs * args.num_steps) - prefill)
    if args.progressive == "none":
        real, dreams = 1.0 if args.dyna_style else 0.0, 1.0
    else:
        dreams = progress if args.progressive == "linear" else (1.0 - 0.01**progress) / 0.99
        real = 1.0 - dreams
    left, left_of_heads = (1.0 - progress if anneal else 1.0 for anneal in (args.anneal_lr, args.anneal_heads_lr))
    heads = args.heads_learning_rate * left_of_heads
    return Optimizers(args.learning_rate * left, heads * dreams, heads * real, args.discriminator_learning_rate * left)


def descend(
    name: str, grads: Params, rates: Optimizers, params: Params, opt_state: Optimizers, optimizers: Optimizers
) -> tuple[Params, Optimizers]:
    """One step of the optimizer of that name."""
    updates, moved = getattr(optimizers, name).update(grads, getattr(opt_state, name), params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -getattr(rates, name) * u, updates))
    return params, opt_state._replace(**{name: moved})


def update_discriminator(
    params: Params, opt_state: Optimizers, batch: Minibatch, key: jax.Array, agent: Agent, optimizers: Optimizers,
    rates: Optimizers, args: Args,
) -> tuple[Params, Optimizers]:  # fmt: skip
    """The discriminator's gradient steps on a minibatch, towards the largest distance that it can see."""
    n = batch.action.shape[0]
    z = agent.encoder.apply(params.encoder, batch.obs)
    predicted = agent.transition.apply(params.transition, z[:n], batch.action)

    def loss(params, key):
        distance = transition_distance(agent.discriminator, params.discriminator, z[:n], batch.action)
        return -masked_mean(distance(predicted, z[-n:], key, args), batch.valid)

    def step(carry, key):
        return descend("discriminator", jax.grad(loss)(carry[0], key), rates, *carry, optimizers), None

    return jax.lax.scan(step, (params, opt_state), jax.random.split(key, args.discriminator_steps))[0]


def update_model(
    state: TrainState, steps: Rollout, advantages: Float[Array, "T B"], key: jax.Array, agent: Agent, optimizers: Optimizers,
    args: Args,
) -> tuple[TrainState, dict[str, Scalar]]:  # fmt: skip
    """All minibatch gradient steps on real data: encoder and world model, and if asked for actor and critic."""
    rates = learning_rates(state.iteration, args)
    draw_key, loss_key = jax.random.split(key)
    if args.use_replay_buffer:
        count = replay.replay_updates(args)
        draws = jax.random.split(draw_key, count)
    else:
        count = args.update_epochs * args.num_minibatches
        draws = minibatch_indices(draw_key, args)

    def take(draw):
        if args.use_replay_buffer:
            return replayed_minibatch(state.params, replay.sample(state.replay, draw, args), agent, args)
        first, env = draw
        length = 1 if args.minibatch_by == "transition" else args.num_steps
        ended = steps.terminated[first + jnp.arange(length)[:, None], env].reshape(-1)
        return gather(steps, advantages, first, env, args), ended, 1.0

    def minibatch_step(carry, drawn):
        draw, key = drawn
        batch, ended, weight = take(draw)
        if args.wasserstein_discriminator:
            carry = update_discriminator(*carry, batch, jax.random.fold_in(key, 2), agent, optimizers, rates, args)
        grads, metrics = jax.grad(model_loss, has_aux=True)(carry[0], batch, ended, weight, key, agent, args)
        metrics |= track_gradients(grads, state.iteration, args)
        carry = descend("model", grads, rates, *carry, optimizers)
        if args.dyna_style or args.progressive != "none":
            carry = descend("real_heads", grads, rates, *carry, optimizers)
        return carry, metrics

    drawn = draws, jax.random.split(loss_key, count)
    (params, opt_state), metrics = jax.lax.scan(minibatch_step, (state.params, state.opt_state), drawn)
    metrics = summarize(metrics, jnp.ones(count, bool), args.num_minibatches) | {
        "charts/learning_rate": jnp.asarray(rates.model)
    }
    return state._replace(params=params, opt_state=opt_state), metrics


def update_heads(
    state: TrainState, steps: Rollout, key: jax.Array, agent: Agent, optimizers: Optimizers, args: Args
) -> tuple[TrainState, dict[str, Scalar]]:
    """All rounds of dreams from the latents of the rollout, and of minibatch gradient steps of actor and critic on them."""
    rates = learning_rates(state.iteration, args)
    z = jax.lax.map(partial(agent.encoder.apply, state.params.encoder), steps.obs[:-1])
    z, awake = z.reshape(-1, *z.shape[2:]), steps.valid.reshape(-1).astype(jnp.float32)
    size, mean = args.imagination_horizon * z.shape[0], partial(jnp.mean, axis=0)

    def minibatch_step(carry, indices, batch):
        batch = jax.tree.map(lambda x: x[indices], batch)
        grads, metrics = jax.grad(heads_loss, has_aux=True)(carry[0], batch, agent, args)
        metrics |= track_gradients(grads, state.iteration, args, "grads/dreams/")
        return descend("heads", grads, rates, *carry, optimizers), metrics

    def dream_and_learn(carry, key):
        dream_key, shuffle_key = jax.random.split(key)
        dreams = imagine(carry[0], z, awake, dream_key, agent, args)
        advantages = dream_advantages(dreams, args.gamma, args.gae_lambda)
        batch = HeadsBatch(dreams.z, dreams.action, dreams.log_prob, dreams.value[:-1], advantages, dreams.weight)
        batch = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), batch)
        keys = jax.random.split(shuffle_key, args.imagination_epochs)
        shuffled = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
        shuffled = shuffled.reshape(args.imagination_epochs * args.num_minibatches, -1)
        carry, metrics = jax.lax.scan(partial(minibatch_step, batch=batch), carry, shuffled)
        dreamt = {
            "dreams/length": jnp.sum(dreams.weight) / jnp.maximum(jnp.sum(awake), 1.0),
            "dreams/reward": weighted_mean(dreams.reward, dreams.weight),
        }
        return carry, jax.tree.map(mean, metrics) | dreamt

    keys = jax.random.split(key, args.n_imagination_rollouts)
    (params, opt_state), metrics = jax.lax.scan(dream_and_learn, (state.params, state.opt_state), keys)
    metrics = jax.tree.map(mean, metrics) | {"charts/heads_learning_rate": jnp.asarray(rates.heads)}
    return state._replace(params=params, opt_state=opt_state), metrics


def gather_experience(
    state: TrainState, key: jax.Array, env: Env, agent: Agent, args: Args
) -> tuple[TrainState, Rollout, Float[Array, "T B"]]:
    """A rollout, kept for replay where asked for, and its advantages."""
    state, steps = rollout(state, key, env, agent, args)
    advantages = compute_gae(steps, args.gamma, args.gae_lambda)
    if args.use_replay_buffer:
        state = state._replace(replay=replay.add(state.replay, steps, args))
    return state, steps, advantages


def prefill_iteration(state: TrainState, env: Env, agent: Agent, args: Args) -> tuple[TrainState, dict[str, Scalar]]:
    """A rollout to fill the buffer, and no update."""
    key, rollout_key = jax.random.split(state.key)
    state, steps, advantages = gather_experience(state._replace(key=key), rollout_key, env, agent, args)
    metrics = rollout_metrics(state.params, steps, advantages, env, agent)
    return state._replace(iteration=state.iteration + 1), metrics


def train_iteration(
    state: TrainState, env: Env, agent: Agent, optimizers: Optimizers, args: Args
) -> tuple[TrainState, dict[str, Scalar]]:
    """One rollout and the updates after it: the unit of work, jitted as a whole."""
    key, rollout_key, model_key, heads_key, trace_key = jax.random.split(state.key, 5)
    old_params = state.params
    state, steps, advantages = gather_experience(state._replace(key=key), rollout_key, env, agent, args)
    state, metrics = update_model(state, steps, advantages, model_key, agent, optimizers, args)
    state, dream_metrics = update_heads(state, steps, heads_key, agent, optimizers, args)
    metrics = metrics | dream_metrics | rollout_metrics(state.params, steps, advantages, env, agent)
    if args.log_dreams:  # of the model that has not learned from this rollout yet
        trace = partial(trace_dreams, old_params, steps, trace_key, agent, args)
        learned = state.iteration - replay.prefill_iterations(args)
        metrics = metrics | occasionally(learned, args.log_dreams_every, trace, traces.PREFIX)
    return state._replace(iteration=state.iteration + 1), metrics


def init_state(args: Args, env: Env, agent: Agent, optimizers: Optimizers) -> TrainState:
    """The state before the first iteration."""
    init_key, key = jax.random.split(jax.random.key(args.seed))
    env_state, obs = env.reset()
    buffer = replay.init_replay(env.obs_spec, env.num_actions, args) if args.use_replay_buffer else None
    params = jax.jit(init_params, static_argnums=1)(init_key, agent, obs)
    opt_state = Optimizers(*(optimizer.init(params) for optimizer in optimizers))
    return TrainState(params, opt_state, env_state, obs, buffer, key, jnp.zeros((), jnp.int32))


def main(args: Args) -> None:
    """Trains, and logs and saves as it goes."""
    check_run(args)
    run = Run(args, "dream_spi", args.num_envs * args.num_steps)
    env = make_env(args, run.iteration)
    replay.check_memory(env.obs_spec, env.num_actions, args)
    agent = make_agent(args, env.num_actions)
    optimizers = make_optimizer(args)
    jit = partial(jax.jit, donate_argnums=0)
    prefill = jit(partial(prefill_iteration, env=env, agent=agent, args=args))
    train = jit(partial(train_iteration, env=env, agent=agent, optimizers=optimizers, args=args))
    with run:
        state = run.restore(init_state(args, env, agent, optimizers), env, agent)
        state = replay.go_on(state, prefill, run.iteration, env, args)
        for k in range(run.iteration, run.num_iterations):
            state, metrics = (prefill if k < replay.prefill_iterations(args) else train)(state)
            run.log(state, metrics)


if __name__ == "__main__":
    run_script(main, Args)
