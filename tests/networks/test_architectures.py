"""Encoder, actor and critic in another type than their parameters."""

import re

import jax
import jax.numpy as jnp
import pytest

import deep_spi
from networks.architectures import make_actor_critic, make_encoder
from tests.states import same
from utils.runs.flags import make_args


def in_type(name, env_id, obs):
    """Parameters; latents, logits and values; the gradient of their sum; and the number of products in bfloat16 for these."""
    args = make_args(deep_spi.Args, env_id=env_id, compute_dtype=name, decoupled_repr=True)
    encoder, actor_critic = make_encoder(args), make_actor_critic(args, 4)

    def outputs(params):
        z = encoder.apply(params[0], obs)
        return z, *actor_critic.apply(params[1], z, obs)

    first = encoder.init(jax.random.key(0), obs)
    params = first, actor_critic.init(jax.random.key(1), encoder.apply(first, obs), obs)
    total = lambda params: sum(jnp.sum(x * jnp.sign(x)) for x in outputs(params))  # noqa: E731
    both = jax.jit(lambda params: (outputs(params), jax.grad(total)(params)))
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*xbf16>.*xbf16>.*xbf16>", both.lower(params).as_text())
    return params, *both(params), len(products)


@pytest.mark.parametrize(
    "env_id, shape, most, least",
    [
        ("Breakout-v5", (4, 84, 84), 255, 2 * (3 * 2 + 3 + 2 + 4)),
        ("Breakout-MinAtar", (10, 10, 4), 1, 2 * (3 + 4)),
        ("CartPole-v1", (4,), 1, 2 * (3 + 4)),
    ],
)
def test_in_bfloat16_they_compute_nearly_the_same_and_all_else_stays_float32(env_id, shape, most, least):
    """Of two encoders and two heads, each layer twice forward, and in the gradients of its kernel and its input."""
    obs = jax.random.randint(jax.random.key(2), (8, *shape), 0, most + 1)
    params, exact, gradient, none = in_type("float32", env_id, obs)
    same_params, rounded, rounded_gradient, products = in_type("bfloat16", env_id, obs)
    assert same(params, same_params) and none == 0
    assert products >= least
    assert {x.dtype for x in jax.tree.leaves((rounded, rounded_gradient))} == {jnp.dtype("float32")}
    for a, b in zip(exact, rounded, strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert 1e-5 < error < 0.03  # bfloat16 keeps eight bits
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(rounded_gradient), strict=True):
        assert jnp.vdot(a, b) > 0.98 * jnp.linalg.norm(a) * jnp.linalg.norm(b)
