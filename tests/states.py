"""A state such as scripts have, small, and what reads it back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Params(NamedTuple):
    encoder: Any
    actor_critic: Any


class State(NamedTuple):
    params: Params
    opt_state: Any
    env_state: Any
    obs: jax.Array
    replay: Any
    key: jax.Array
    iteration: jax.Array


def make_state(seed=0, size=4):
    """Random parameters, the state of an optimizer that has made a step, a typed key, and a field that is None."""
    rng = np.random.default_rng(seed)
    kernel = lambda: {"params": {"kernel": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)}}  # noqa: E731
    params = Params(kernel(), kernel())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    opt_state = optimizer.update(params, optimizer.init(params))[1]
    env_state = {"over": jnp.array([True, False]), "frame": jnp.arange(6, dtype=jnp.uint8)}
    obs = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    return State(params, opt_state, env_state, obs, None, jax.random.key(seed), jnp.asarray(seed, jnp.int32))


def numbers(tree):
    """Leaves as NumPy has them, keys too."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.array(plain(x)) for x in jax.tree.leaves(tree)]


def same(a, b):
    """Whether two trees are the same to the bit, types included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))
