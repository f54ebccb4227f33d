"""Encoder, actor and critic: what an observation is selects the layers; and in another type than their parameters."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from envs.observations import Part
from networks.architectures import Encoder, make_actor_critic, make_encoder
from networks.convolution import halve
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


def test_images_of_all_layouts_are_read_alike():
    """Bytes or floats, channels first or last: the same parameters give the same feature map."""
    frames = jax.random.randint(jax.random.key(0), (3, 4, 36, 44), 0, 256).astype(jnp.uint8)
    encoder = Encoder()
    params = encoder.init(jax.random.key(1), frames)
    assert set(params["params"]) == {"Conv_0", "Conv_1", "Conv_2"}  # the names that checkpoints have
    z = encoder.apply(params, frames)
    assert z.shape == (3, 1, 2, 64)
    last = frames.transpose(0, 2, 3, 1)
    for other in (last, last / 255.0, frames / 255.0):
        np.testing.assert_allclose(encoder.apply(params, other), z, rtol=1e-4, atol=1e-5)


class PlainImpala(nn.Module):
    """IMPALA's network from Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        for features in (16, 32, 32):
            x = nn.max_pool(nn.Conv(features, (3, 3))(x), (3, 3), (2, 2), "SAME")
            for _ in range(2):
                x = x + nn.Conv(features, (3, 3))(nn.relu(nn.Conv(features, (3, 3))(nn.relu(x))))
        return nn.relu(x)


@pytest.mark.slow
def test_impala_equals_flax_layers_with_its_gradients():
    frames = jax.random.randint(jax.random.key(0), (2, 3, 40, 36), 0, 256).astype(jnp.uint8)
    pixels = frames.transpose(0, 2, 3, 1) / 255.0
    ours, plain = Encoder(images="impala"), PlainImpala()
    params = jax.jit(ours.init)(jax.random.key(1), frames)
    same = {"params": params["params"]["Impala_0"]}
    loss = lambda f, x: lambda p: jnp.sum(jnp.sin(f(p, x)))  # noqa: E731
    z, expected = ours.apply(params, frames), plain.apply(same, pixels)
    assert z.shape == (2, 5, 5, 32)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-4)
    gradient = jax.jit(jax.grad(loss(ours.apply, frames)))(params)["params"]["Impala_0"]
    for a, b in zip(
        *map(jax.tree.leaves, (gradient, jax.jit(jax.grad(loss(plain.apply, pixels)))(same)["params"])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (3, 5)])
def test_halve_is_max_pooling(shape):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    pool = lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")  # noqa: E731
    np.testing.assert_array_equal(halve(x), pool(x))
    weight = jax.random.normal(jax.random.key(1), pool(x).shape)
    gradient, expected = (jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x) for f in (halve, pool))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_symbols_become_planes_and_codes():
    """A map of two channels, of 3 and 2 symbols, beside an integer from -1 to 2: by hand."""
    parts = (Part("map", (3, 3, 2), "symbols", (3, 2)), Part("count", (1,), "symbols", (4,), lowest=-1))
    encoder = Encoder(parts=parts)
    grid = jnp.array([0, 1] * 4 + [2, 0] + [0, 0] * 4)
    obs = jnp.concatenate([grid, jnp.array([-1])])[None]
    params = encoder.init(jax.random.key(0), obs)
    assert params["params"]["GridLayer_0"]["kernel"].shape == (3, 3, 5, 16)
    assert params["params"]["Dense_0"]["kernel"].shape == (16 + 4, 128)
    planes = np.zeros((3, 3, 5), np.float32)
    planes.reshape(9, 5)[:4, [0, 4]] = 1  # symbol 0 of the first channel, symbol 1 of the second
    planes.reshape(9, 5)[4, [2, 3]] = 1
    planes.reshape(9, 5)[5:, [0, 3]] = 1
    layer, dense = params["params"]["GridLayer_0"], params["params"]["Dense_0"]
    features = np.maximum(np.tensordot(planes, layer["kernel"], 3) + layer["bias"], 0)
    expected = np.maximum(np.concatenate([features, [1, 0, 0, 0]]) @ dense["kernel"] + dense["bias"], 0)
    np.testing.assert_allclose(encoder.apply(params, obs)[0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_counts_are_scaled():
    encoder = Encoder(parts=(Part("count", (2,), "counts", (4001,), lowest=-1),))
    params = {"params": {"Dense_0": {"kernel": jnp.eye(2, 64), "bias": jnp.zeros(64)}}}
    z = encoder.apply(params, jnp.array([[-1, 3999], [999, 1999]]))
    np.testing.assert_allclose(z[:, 0, 0, :2], [[0.0, 1.0], [0.25, 0.5]])


def test_texts_that_differ_in_one_letter_have_other_features():
    parts = (Part("mission", (21,), "text"),)
    encoder = Encoder(parts=parts)
    texts = [np.frombuffer(f"go to the {color}".ljust(21, "\0").encode(), np.uint8) for color in ("red", "rod", "red")]
    params = encoder.init(jax.random.key(0), jnp.asarray(texts))
    z = encoder.apply(params, jnp.asarray(texts)).reshape(3, -1)
    assert z.shape[1] == 64 and np.array_equal(z[0], z[2]) and np.abs(z[0] - z[1]).max() > 1e-3


def test_normalized_latents_have_mean_0_and_variance_1():
    obs = 9.0 * jax.random.normal(jax.random.key(0), (4, 12))
    args = make_args(deep_spi.Args, env_id="CartPole-v1", layer_norm_latent=True)
    z, _ = make_encoder(args).init_with_output(jax.random.key(1), obs)
    assert z.shape == (4, 1, 1, 64)
    np.testing.assert_allclose(z.reshape(4, -1).mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(z.reshape(4, -1).std(1), 1.0, rtol=1e-3)


def test_neither_an_image_nor_a_grid():
    with pytest.raises(ValueError, match=r"observations of shape \[2, 40, 3\]"):
        Encoder().init(jax.random.key(0), jnp.zeros((1, 2, 40, 3)))
