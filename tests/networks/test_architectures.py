"""Encoder, actor and critic in another type than their parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from networks.architectures import make_actor_critic, make_encoder
from utils.runs.flags import make_args


def in_type(name, env_id, obs):
    """Latents, logits and values; the gradient of their sum; the number of products in bfloat16 for these; and the parameters'
    shapes and types. The parameters are random numbers, because the initial ones take longer to compile than all else."""
    args = make_args(deep_spi.Args, env_id=env_id, compute_dtype=name, decoupled_repr=True, fc_layers=(64,))
    encoder, actor_critic = make_encoder(args), make_actor_critic(args, 4)

    def outputs(params):
        z = encoder.apply(params[0], obs)
        return z, *actor_critic.apply(params[1], z, obs)

    def init(obs):
        z, first = encoder.init_with_output(jax.random.key(0), obs)
        return first, actor_critic.init(jax.random.key(1), z, obs)

    def total(params):
        found = outputs(params)
        return sum(jnp.sum(x * jnp.sign(x)) for x in found), found

    shapes, rng = jax.eval_shape(init, obs), np.random.default_rng(0)
    params = jax.tree.map(lambda x: (rng.normal(size=x.shape) / max(1, np.prod(x.shape[:-1])) ** 0.5).astype(x.dtype), shapes)
    both = jax.jit(jax.grad(total, has_aux=True)).lower(params)
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*xbf16>.*xbf16>.*xbf16>", both.as_text())
    gradient, found = both.compile()(params)
    return found, gradient, len(products), jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


@pytest.mark.parametrize(
    "env_id, shape, most, least",
    [
        ("Breakout-v5", (4, 36, 36), 255, 2 * (3 + 3 + 2 + 3)),  # the smallest frames
        ("Breakout-MinAtar", (10, 10, 4), 1, 2 * (2 + 3 + 3)),
        ("CartPole-v1", (4,), 1, 2 * (2 + 3)),
    ],
)
def test_in_bfloat16_they_compute_nearly_the_same_and_all_else_stays_float32(env_id, shape, most, least):
    """Of two encoders and heads, each layer: forward, its kernel's gradient (on a CPU in several products), its input's."""
    obs = jax.random.randint(jax.random.key(2), (8, *shape), 0, most + 1)
    exact, gradient, none, params = in_type("float32", env_id, obs)
    rounded, rounded_gradient, products, same_params = in_type("bfloat16", env_id, obs)
    assert params == same_params and none == 0 and products >= least
    assert {x.dtype for x in jax.tree.leaves((rounded, rounded_gradient))} == {jnp.dtype("float32")}
    for a, b in zip(*jax.device_get((exact, rounded)), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert 1e-5 < error < 0.03  # bfloat16 keeps eight bits
    for a, b in zip(*(jax.tree.leaves(jax.device_get(x)) for x in (gradient, rounded_gradient)), strict=True):
        assert np.vdot(a, b) > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)
