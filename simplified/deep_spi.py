"""Deep SPI (Delgrange et al., 2026, arXiv:2510.12312) in one file: networks, rollout, loss, update, and all seeds at once.

    uv run --extra minatar simplified/deep_spi.py --game breakout --seeds 1 2 3

The file imports nothing else of this project: copy it into your own code. It has the loss and the update of `deep_spi.py` (a
test compares them), its own defaults for 1M steps, and no options, logs or checkpoints. The games are pgx's MinAtar. For other
environments, write a class like `MinAtar`. A time limit must end the episode there; its value is not bootstrapped.

Shapes: T steps x B environments, N transitions in a minibatch, A actions, D elements of a latent.
"""

import argparse
import time
from collections import namedtuple
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

COMPONENTS = 5  # of the transition's mixture


class Config(NamedTuple):
    total_timesteps: int = 1_000_000
    num_envs: int = 64  # B
    num_steps: int = 128  # T
    num_epochs: int = 4
    num_minibatches: int = 8
    learning_rate: float = 2e-3  # annealed to 0
    max_grad_norm: float = 0.5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_coef: float = 0.1  # eps: the clipped ratio stays in [1 - eps, 1 + eps]
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    transition_loss_coef: float = 5e-4  # c_P
    reward_loss_coef: float = 0.01  # c_R

    @property
    def num_updates(self):
        return self.total_timesteps // (self.num_envs * self.num_steps)


class MinAtar:
    """A MinAtar game of pgx behind gymnax's interface: `reset`, and `step_env`, which does not reset at the end."""

    def __init__(self, game):
        import pgx  # pip install pgx pgx-minatar

        self.game = pgx.make(f"minatar-{game}")
        self.num_actions = self.game.num_actions

    def reset(self, key, params=None):
        state = self.game.init(key)
        return state.observation, state

    def step_env(self, key, state, action, params=None):
        state = self.game.step(state, action, key)
        return state.observation, state, state.rewards[0], state.terminated, {}


def dense(features, gain=2**0.5):
    return nn.Dense(features, kernel_init=nn.initializers.orthogonal(gain))


class Encoder(nn.Module):
    """phi: observation -> latent z. A 3 x 3 convolution and a dense layer for grids [H, W, C], a dense layer for vectors."""

    @nn.compact
    def __call__(self, obs):
        x = obs.astype(jnp.float32)
        if x.ndim == 4:  # multiply patches: XLA's CPU backend is slow at the gradient of a convolution inside a loop
            height, width = x.shape[1] - 2, x.shape[2] - 2
            x = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)
            x = nn.relu(dense(16)(x))
        return nn.relu(dense(128 if obs.ndim == 4 else 64)(x.reshape(len(x), -1)))


class ActorCritic(nn.Module):  # z -> logits of pi(a|z), and V(z)
    num_actions: int

    @nn.compact
    def __call__(self, z):
        return dense(self.num_actions, 0.01)(z), dense(1, 1.0)(z)[:, 0]


def orthogonal(kernel):
    """Map `kernel` [..., m, n] to a matrix of norm at most 1 with singular values near 1.

    Almost-orthogonal rescaling (Prach & Lampert, 2022, theorem 1) bounds the norm: W D^(-1/2) with D = diag(sum |W^T W|). The
    polynomial s p(s^2) then maps each singular value s from [0.3, 1] into [0.95, 1], and [0, 1] into itself.
    """
    if kernel.shape[-2] < kernel.shape[-1]:
        return orthogonal(kernel.mT).mT
    kernel = kernel / jax.lax.stop_gradient(jnp.max(jnp.abs(kernel), axis=(-2, -1), keepdims=True))
    gram = kernel.mT @ kernel
    scale = jax.lax.rsqrt(jnp.sum(jnp.abs(gram), axis=-1, keepdims=True))
    gram = scale * gram * scale.mT
    square = gram @ gram
    polynomial = 4.45026 * jnp.eye(gram.shape[-1]) - 17.37977 * gram + 38.29629 * square
    return kernel @ (scale * (polynomial + square @ (14.58135 * square - 38.94814 * gram)))


def group_sort(x):
    """Sort channels c and c + C/2 (GroupSort(2), Anil et al., 2019): norm-preserving, like a permutation."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.minimum(a, b), jnp.maximum(a, b)], axis=-1)


class LipschitzDense(nn.Module):
    """A dense layer of norm at most 1, for every value of its parameters."""

    features: int
    init: nn.initializers.Initializer = nn.initializers.orthogonal()

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.init, (x.shape[-1], self.features))
        return x @ orthogonal(kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


def near_identity(key, shape):
    """The kernels of the locations map (-|z|, |z|) to |z| at first, plus noise that tells the components apart."""
    noise, eye = jax.random.normal(key, shape) / shape[-2] ** 0.5, jnp.eye(shape[-1])
    is_location = jnp.arange(shape[1])[:, None, None, None] < COMPONENTS
    return jnp.where(is_location, jnp.concatenate([-eye, eye]) + 0.1 * noise, noise)


class Transition(nn.Module):
    """(z, a) -> location and scale of z', a weighted average of COMPONENTS normals, hence a normal.

    The sample loc + scale * noise with noise in [-1, 1] is 1-Lipschitz in z: slopes are at most 0.9 and 0.1, and the weights
    depend on the action only.
    """

    num_actions: int

    @nn.compact
    def __call__(self, z, action):
        size = z.shape[-1]
        groups = max(16, size // 4)  # each maps 2D/groups channels to D/groups, with a kernel per action
        mirror = lambda key, shape: jnp.concatenate([jnp.eye(size), -jnp.eye(size)], axis=1)  # noqa: E731
        x = group_sort(LipschitzDense(2 * size, mirror)(z)).reshape(len(z), -1, groups)
        shape = (self.num_actions, 2 * COMPONENTS, groups, 2 * size // groups, size // groups)
        kernels = orthogonal(self.param("kernels", near_identity, shape))
        bias = self.param("bias", nn.initializers.zeros, (self.num_actions, 2 * COMPONENTS, size))
        weights = nn.softmax(self.param("mixture", nn.initializers.zeros, (self.num_actions, COMPONENTS)))

        average = partial(jnp.einsum, "ak,ak...->a...", weights)  # average the kernels of the locations, not their products
        loc = jnp.einsum("ngco,ncg->nog", average(kernels[:, :COMPONENTS])[action], x).reshape(z.shape)
        loc = loc + average(bias[:, :COMPONENTS])[action]
        scales = jnp.einsum("nkgco,ncg->nkog", kernels[action, COMPONENTS:], x).reshape(len(z), COMPONENTS, size)
        scales = nn.softplus(scales + bias[action, COMPONENTS:]) + 1e-6
        scale = jnp.sqrt(jnp.sum((weights[action][:, :, None] * scales) ** 2, axis=1))
        return 0.9 * loc, 0.1 * scale


class Reward(nn.Module):
    """(z, a) -> expected reward, 1-Lipschitz in z."""

    num_actions: int

    @nn.compact
    def __call__(self, z, action):
        features = min(256, z.shape[-1])
        x = group_sort(LipschitzDense(features)(z))
        x = group_sort(LipschitzDense(features)(x))
        kernel = self.param("kernel", nn.initializers.orthogonal(), (features, self.num_actions))
        rewards = x @ (kernel / jnp.linalg.norm(kernel, axis=0))
        rewards = rewards + self.param("bias", nn.initializers.zeros, (self.num_actions,))
        return jnp.take_along_axis(rewards, action[:, None], axis=1)[:, 0]


Agent = namedtuple("Agent", "encoder actor_critic transition reward")  # the networks, or their parameters
# transitions: [T, B, ...] from a rollout, [N, ...] in a minibatch; where `done`, `next_obs` is the terminal observation
Batch = namedtuple("Batch", "obs action log_prob value reward done next_obs advantage")


def rollout(key, params, world, env, agent, config):
    """Take T steps in B environments. `world`: their states, observations, and the returns of the running episodes."""
    policy = lambda obs: agent.actor_critic.apply(params.actor_critic, agent.encoder.apply(params.encoder, obs))  # noqa: E731

    def step(world, key):
        env_state, obs, returns = world
        act_key, world_key = jax.random.split(key)
        logits, value = policy(obs)
        action = jax.random.categorical(act_key, logits)
        log_prob = jnp.take_along_axis(nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        step_keys, reset_keys = jax.random.split(world_key, (2, config.num_envs))
        next_obs, env_state, reward, done, _ = jax.vmap(env.step_env)(step_keys, env_state, action)
        transition = Batch(obs, action, log_prob, value, reward, done, next_obs, jnp.zeros_like(value))
        choose = jax.vmap(lambda done, a, b: jax.tree.map(partial(jnp.where, done), a, b))
        obs, env_state = choose(done, jax.vmap(env.reset)(reset_keys), (next_obs, env_state))
        returns = returns + reward
        return (env_state, obs, jnp.where(done, 0.0, returns)), (transition, returns)

    def gae(advantage, delta_and_done):  # generalized advantage estimation (Schulman et al., 2016, equation 16), backwards
        delta, done = delta_and_done
        advantage = delta + config.gamma * config.gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    world, (batch, returns) = jax.lax.scan(step, world, jax.random.split(key, config.num_steps))
    value = jnp.concatenate([batch.value, policy(world[1])[1][None]])
    delta = batch.reward + config.gamma * (1.0 - batch.done) * value[1:] - value[:-1]
    _, advantage = jax.lax.scan(gae, jnp.zeros(config.num_envs), (delta, batch.done), reverse=True)
    ended = jnp.sum(batch.done), jnp.sum(jnp.where(batch.done, returns, 0.0))
    return world, batch._replace(advantage=advantage), ended


def loss_fn(params, batch, noise, agent, config):
    """Deep SPI's loss of N transitions. `noise` [N, D] in [-1, 1] draws the predicted next latents."""
    z, next_z = jnp.split(agent.encoder.apply(params.encoder, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    logits, value = agent.actor_critic.apply(params.actor_critic, z)
    log_probs = nn.log_softmax(logits)
    ratio = jnp.exp(jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0] - batch.log_prob)
    clipped_ratio = jnp.clip(ratio, 1 - config.clip_coef, 1 + config.clip_coef)
    advantage = (batch.advantage - jnp.mean(batch.advantage)) / (jnp.std(batch.advantage) + 1e-8)

    # The utility U = A - c_R l_R - c_P l_P. No gradient is stopped: through U, encoder and world model learn, ratio-weighted.
    loc, scale = agent.transition.apply(params.transition, z, batch.action)
    transition_loss = jnp.sum(optax.huber_loss(loc + scale * noise - next_z), axis=-1)
    reward_loss = optax.huber_loss(agent.reward.apply(params.reward, z, batch.action) - batch.reward)
    utility = advantage - config.reward_loss_coef * reward_loss - config.transition_loss_coef * transition_loss

    policy_loss = jnp.mean(jnp.maximum(-utility * ratio, -utility * clipped_ratio))
    entropy = jnp.mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
    value_loss = jnp.mean(0.5 * (value - (batch.advantage + batch.value)) ** 2)
    return policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss


def make_optimizer(config):
    """Adam on the clipped gradient. The learning rate falls linearly to 0, in one step per rollout."""
    steps = config.num_epochs * config.num_minibatches
    schedule = lambda count: config.learning_rate * (1.0 - (count // steps) / config.num_updates)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5))


def make_train(env, config):
    """Return `init(key) -> state` and `iterate(state) -> state, (number of episodes, sum of their returns)`, for one seed."""
    agent = Agent(Encoder(), ActorCritic(env.num_actions), Transition(env.num_actions), Reward(env.num_actions))
    optimizer, size = make_optimizer(config), config.num_envs * config.num_steps

    def init(key):
        key, env_key, *keys = jax.random.split(key, 6)
        obs, env_state = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
        z, encoder = agent.encoder.init_with_output(keys[0], obs)
        model = (f.init(key, z, jnp.zeros(len(z), int)) for f, key in zip(agent[2:], keys[2:], strict=True))
        params = Agent(encoder, agent.actor_critic.init(keys[1], z), *model)
        return key, params, optimizer.init(params), (env_state, obs, jnp.zeros(config.num_envs))

    def minibatch_step(batch, carry, minibatch):
        (params, opt_state), (indices, key) = carry, minibatch
        taken = jax.tree.map(lambda x: x[indices], batch)
        z_size = jax.eval_shape(agent.encoder.apply, params.encoder, taken.obs).shape[-1]
        noise = jnp.clip(jax.random.normal(key, (len(indices), z_size)), -1.0, 1.0)
        grads = jax.grad(loss_fn)(params, taken, noise, agent, config)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def iterate(state):
        key, params, opt_state, world = state
        key, act_key, shuffle_key, noise_key = jax.random.split(key, 4)
        world, batch, ended = rollout(act_key, params, world, env, agent, config)
        batch = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), batch)
        shuffled = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(shuffle_key, config.num_epochs))
        indices = shuffled.reshape(config.num_epochs * config.num_minibatches, -1)
        minibatches = indices, jax.random.split(noise_key, len(indices))
        (params, opt_state), _ = jax.lax.scan(partial(minibatch_step, batch), (params, opt_state), minibatches)
        return (key, params, opt_state, world), ended

    return init, iterate


def main():
    parser = argparse.ArgumentParser(description="Deep SPI on MinAtar, all seeds at once.")
    parser.add_argument("--game", default="breakout", choices=["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--total-timesteps", type=int, default=Config().total_timesteps, help="steps of each seed")
    args = parser.parse_args()
    config = Config(args.total_timesteps)
    if config.num_updates < 1:
        parser.error(f"--total-timesteps: must be at least {config.num_envs * config.num_steps}, one rollout")
    init, iterate = map(jax.vmap, make_train(MinAtar(args.game), config))
    state, iterate = jax.jit(init)(jax.vmap(jax.random.key)(jnp.array(args.seeds))), jax.jit(iterate, donate_argnums=0)
    started, episodes, total = time.time(), 0, 0
    for i in range(1, config.num_updates + 1):
        state, ended = iterate(state)
        episodes, total = episodes + ended[0], total + ended[1]
        if i % max(1, config.num_updates // 20) == 0 or i == config.num_updates:
            mean, steps = total / episodes, i * config.num_envs * config.num_steps
            seeds, bar = " ".join(f"{x:6.2f}" for x in mean), "#" * int(jnp.nan_to_num(mean.mean()))
            print(f"{steps:>10,} steps {time.time() - started:5.0f} s  return of each seed {seeds}  {bar}", flush=True)
            episodes, total = 0, 0


if __name__ == "__main__":
    main()
