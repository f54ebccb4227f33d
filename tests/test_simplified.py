"""simplified/deep_spi.py: the same loss and update as deep_spi.py, and it learns."""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import deep_spi
from simplified import deep_spi as simplified
from tests.commands import ROOT, run
from utils.distributions import clipped_normal
from utils.runs.flags import make_args

NUM_ACTIONS = 3


def simplify(params):
    """Parameters of `deep_spi.py` for a grid, in the tree of the simplified script."""
    encoder, heads, transition, reward = (x["params"] for x in params)
    conv = encoder["GridLayer_0"]
    conv = {"kernel": conv["kernel"].reshape(-1, conv["kernel"].shape[-1]), "bias": conv["bias"]}
    lipschitz = lambda layer: {"kernel": layer.get("kernel", layer.get("dense")), "bias": layer["bias"]}  # noqa: E731
    trees = (
        {"Dense_0": conv, "Dense_1": encoder["Dense_0"]},
        {"Dense_0": heads["actor"], "Dense_1": heads["critic"]},
        {
            "LipschitzDense_0": lipschitz(transition["hidden"]),
            "kernels": transition["dense"].transpose(2, 3, 4, 0, 1),
            "bias": transition["bias"],
            "mixture": transition["mixture"],
        },
        {name: lipschitz(reward[name]) for name in ("LipschitzDense_0", "LipschitzDense_1")} | reward["LipschitzScalars_0"],
    )
    return simplified.Agent(*({"params": tree} for tree in trees))


def test_loss_gradients_and_a_gradient_step_are_those_of_the_script():
    """On random grids and random parameters, moved away from their initial values so that no term is trivial."""
    args = make_args(
        deep_spi.Args, env_id="Breakout-MinAtar", transition_loss_coef=0.3, reward_loss_coef=0.4, learning_rate=2e-3
    )
    config = simplified.Config(transition_loss_coef=0.3, reward_loss_coef=0.4)
    agent = deep_spi.make_agent(args, NUM_ACTIONS)
    networks = simplified.Transition(NUM_ACTIONS), simplified.Reward(NUM_ACTIONS)
    ours = simplified.Agent(simplified.Encoder(), simplified.ActorCritic(NUM_ACTIONS), *networks)
    n, keys = 16, iter(jax.random.split(jax.random.key(0), 20))
    obs = jax.random.bernoulli(next(keys), 0.2, (2 * n, 10, 10, 4)).astype(jnp.uint8)
    params = jax.jit(deep_spi.init_params, static_argnums=1)(next(keys), agent, obs)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    params = jax.jit(unravel)(flat + 0.1 * jax.random.normal(next(keys), flat.shape))
    action = jax.random.randint(next(keys), (n,), 0, NUM_ACTIONS)
    log_probs = jax.nn.log_softmax(jax.random.normal(next(keys), (n, NUM_ACTIONS)))
    value, advantage, reward = (jax.random.normal(k, (n,)) for k in (next(keys), next(keys), next(keys)))
    key = next(keys)
    masks = jnp.ones(n, bool), jnp.zeros(n, bool)
    batch = deep_spi.Minibatch(obs, action, log_probs, value, advantage, advantage + value, reward, *masks)
    loss_fn = partial(deep_spi.loss_fn, agent=agent, args=args)
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, key)

    log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]
    simple = simplified.Batch(obs[:n], action, log_prob, value, reward, jnp.zeros(n, bool), obs[n:], advantage)
    noise = clipped_normal(key, (n, 1, 1, 128), 1.0).reshape(n, 128)
    loss_fn = partial(simplified.loss_fn, agent=ours, config=config)
    found, found_grads = jax.jit(jax.value_and_grad(loss_fn))(simplify(params), simple, noise)
    assert_allclose(found, loss, rtol=1e-5)
    close = lambda a, b: assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-7)  # noqa: E731
    jax.tree.map(close, found_grads, simplify(grads))

    optimizer = deep_spi.make_optimizer(args)
    updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params))
    expected = jax.tree.map(lambda p, u: np.asarray(p) - args.learning_rate * np.asarray(u), params, updates)
    optimizer = simplified.make_optimizer(config)
    # the same gradients: Adam divides by their size, and would turn rounding errors of tiny ones into large differences
    step = jax.jit(lambda p, g: optax.apply_updates(p, optimizer.update(g, optimizer.init(p))[0]))
    jax.tree.map(partial(assert_allclose, atol=1e-6), step(simplify(params), simplify(grads)), simplify(expected))


class Cue:
    """Gymnax's interface: the observation shows which of two actions is paid. Episodes last two steps, the second pays more."""

    num_actions = 2

    def reset(self, key, params=None):
        cue = jax.random.bernoulli(key).astype(jnp.int32)
        return jax.nn.one_hot(cue, 2), (cue, jnp.zeros((), jnp.int32))

    def step_env(self, key, state, action, params=None):
        cue, age = state
        reward = (action == cue) * (1.0 + age)
        obs, (cue, _) = self.reset(key)
        return obs, (cue, age + 1), reward, age == 1, {}


def test_it_learns_a_probe_and_counts_its_episodes():
    """Of a gymnax-like environment with vector observations, for two seeds at once."""
    config = simplified.Config(num_envs=16, num_steps=8, num_minibatches=2, total_timesteps=16 * 8 * 40)
    init, iterate = map(jax.vmap, simplified.make_train(Cue(), config))
    state, iterate = jax.jit(init)(jax.random.split(jax.random.key(0), 2)), jax.jit(iterate)
    history = []
    for _ in range(config.num_updates):
        state, (episodes, total) = iterate(state)
        np.testing.assert_array_equal(episodes, 16 * 8 // 2)
        history.append(total / episodes)
    assert np.all(history[0] < 2.2) and np.all(np.mean(history[-5:], axis=0) > 2.9)  # always right: 1 + 2


def test_it_imports_nothing_of_this_project():
    text = (ROOT / "simplified/deep_spi.py").read_text()
    assert len(text.splitlines()) <= 300
    for package in ("envs", "networks", "utils", "experiments", "deep_mdp_ppo"):
        assert f"import {package}" not in text and f"from {package}" not in text


def test_mistakes_get_one_line():
    for flags, said in ((["--game", "pong"], "invalid choice: 'pong'"), (["--total-timesteps", "10"], "must be at least 8192")):
        done = run("simplified/deep_spi.py", *flags)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_it_learns_breakout():
    done = run("simplified/deep_spi.py", "--seeds", "1", "--total-timesteps", "200000", timeout=600)
    returns = [float(line.split("seed")[1].split()[0]) for line in done.stdout.splitlines()]
    assert returns[0] < 1.0 and returns[-1] > 2.5
