"""Every certified layer, materialised as a matrix, has norm at most 1; the whole transition and reward are K-Lipschitz."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from networks.lipschitz import (
    COEFFICIENTS,
    LipschitzConv,
    LipschitzDense,
    LipschitzScalars,
    group_sort,
    orthogonal,
    orthogonal_all,
    orthogonal_conv_kernel,
    projection,
)
from networks.world_models.lipschitz import DeepTransition, Reward, Transition

TOLERANCE = 1e-4
SIZE = 4  # of the feature maps that are materialised


def singular_values(f, shape):
    """Of the linear part of the affine map f, exactly: its columns are the images of the unit vectors."""
    n = int(np.prod(shape))
    rows = f(jnp.eye(n).reshape(n, *shape)).reshape(n, -1) - f(jnp.zeros((1, *shape))).reshape(1, -1)
    return np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)


def parameter_cases(params):
    """Random, tiny, huge, rank-deficient, zero, and badly scaled parameters."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    normal = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    cases = {
        "initial": leaves,
        "x1000": [1000 * p for p in leaves],
        "x0.001": [0.001 * p for p in leaves],
        "x1e-25": [1e-25 * p for p in leaves],
        "x1e25": [1e25 * p for p in leaves],
        "normal": normal,
        "ones": [jnp.ones_like(p) for p in leaves],
        "zeros": [jnp.zeros_like(p) for p in leaves],
        "scales": [p * 10.0 ** jnp.linspace(-6, 3, p.shape[0]).reshape(-1, *(1,) * (p.ndim - 1)) for p in normal],
    }
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    biases = ["bias" in name or "action" in name for name in names]  # which are not made small again
    cases["x1e25"] = [leaf if bias else p for p, leaf, bias in zip(cases["x1e25"], leaves, biases, strict=True)]
    return {name: jax.tree.unflatten(tree, case) for name, case in cases.items()}


LAYERS = {
    "dense narrowing": (LipschitzDense(12), (40,)),
    "dense widening": (LipschitzDense(40), (12,)),
    "dense square": (LipschitzDense(24), (24,)),
    "conv widening": (LipschitzConv(16), (SIZE, SIZE, 8)),
    "conv narrowing": (LipschitzConv(4), (SIZE, SIZE, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_norm_at_most_one_for_all_parameters(name):
    layer, shape = LAYERS[name]
    for case, params in parameter_cases(layer.init(jax.random.key(0), jnp.ones((1, *shape)))).items():
        values = singular_values(lambda x, params=params: layer.apply(params, x), shape)
        assert values[0] <= 1 + TOLERANCE, (case, values[0])
        if case in ("initial", "x1000", "x0.001", "x1e-25", "x1e25"):
            assert values[0] >= 0.9, (case, values[0])


def test_scalars_are_each_one_lipschitz():
    layer = LipschitzScalars(3)
    for case, params in parameter_cases(layer.init(jax.random.key(0), jnp.ones((1, 10)))).items():
        for i in range(3):
            norm = singular_values(lambda x, i=i, params=params: layer.apply(params, x)[:, i], (10,))[0]
            assert norm <= 1 + TOLERANCE and (case == "zeros" or norm >= 0.999), (case, norm)


def test_polynomial_keeps_the_unit_interval_and_lifts_most_of_it():
    s = np.linspace(0, 1, 1_000_001)
    lifted = s * np.polynomial.polynomial.polyval(s**2, COEFFICIENTS)
    assert lifted.min() >= 0 and lifted.max() <= 1
    assert lifted[s >= 0.3].min() >= 0.95


@settings(max_examples=6, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), scale=st.floats(-4, 4), seed=st.integers(0, 99))
def test_orthogonal_bounds_one_matrix_and_each_of_a_batch(m, n, scale, seed):
    kernels = 10.0**scale * jax.random.normal(jax.random.key(seed), (m, n, 3)) ** 3
    batched = orthogonal(kernels)
    for b in range(3):
        single = orthogonal(kernels[..., b])
        np.testing.assert_allclose(batched[..., b], single, atol=1e-4)
        assert np.linalg.norm(np.asarray(single, np.float64), 2) <= 1 + TOLERANCE


@pytest.mark.parametrize("batch", [(), (3,)])
def test_orthogonal_of_several_is_that_of_each(batch):
    shapes = (6, 4), (4, 6), (5, 5), (6, 4), (2, 7)
    kernels = [jax.random.normal(jax.random.key(i), (*shape, *batch)) for i, shape in enumerate(shapes)]
    for kernel, made in zip(kernels, orthogonal_all(*kernels), strict=True):
        np.testing.assert_allclose(made, orthogonal(kernel), atol=1e-5)


def test_projection_and_gradients_are_finite_at_zero():
    p = projection(orthogonal(jax.random.normal(jax.random.key(0), (8, 4, 5))))
    for b in range(5):
        values = np.linalg.eigvalsh(np.asarray(p[..., b], np.float64))
        assert values.min() >= -TOLERANCE and values.max() <= 1 + TOLERANCE
    grads = jax.grad(lambda *args: jnp.sum(orthogonal_conv_kernel(*args)), argnums=(0, 1, 2))(
        jnp.zeros((8, 4, 2)), jnp.zeros((8, 4, 2)), jnp.zeros((8, 4, 2))
    )
    assert all(bool(jnp.isfinite(g).all()) for g in grads)
    for layer in (LipschitzDense(3), LipschitzScalars(3)):
        params = jax.tree.map(jnp.zeros_like, layer.init(jax.random.key(0), jnp.ones((2, 5))))
        grads = jax.grad(lambda p, layer=layer: layer.apply(p, jnp.ones((2, 5))).sum())(params)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_products_written_for_batches_have_the_gradients_of_plain_ones():
    from networks import lipschitz

    a, b = jax.random.normal(jax.random.key(0), (3, 4, 2, 6)), jax.random.normal(jax.random.key(1), (4, 5, 2, 6))
    loss = lambda product: lambda a, b: jnp.sum(jnp.sin(product(a, b)))  # noqa: E731
    plain = lambda a, b: jnp.einsum("mk...,kn...->mn...", a, b)  # noqa: E731
    for actual, expected in zip(
        jax.grad(loss(lipschitz.matmul), argnums=(0, 1))(a, b), jax.grad(loss(plain), argnums=(0, 1))(a, b), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    w = jax.random.normal(jax.random.key(2), (7, 3))
    np.testing.assert_allclose(
        jax.grad(lambda w: jnp.sum(jnp.sin(lipschitz.gram(w))))(w), jax.grad(lambda w: jnp.sum(jnp.sin(w.T @ w)))(w), atol=1e-5
    )


def test_group_sort_permutes():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    y = group_sort(x)
    np.testing.assert_array_equal(np.sort(x), np.sort(y))
    assert bool((y[:, :4] <= y[:, 4:]).all())


def train(module, params, loss, steps):
    optimizer = optax.adam(2.5e-4)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)

    (params, _), losses = run(params)
    return params, losses


class Pair(nn.Module):
    """A convolution and a dense layer, trained together as in the world model."""

    @nn.compact
    def __call__(self, x):
        x = group_sort(LipschitzConv(16, name="conv")(x))
        return LipschitzDense(8, name="dense")(x.reshape(x.shape[0], -1))


def test_trained_layers_keep_singular_values_near_one():
    x = jax.random.uniform(jax.random.key(0), (64, SIZE, SIZE, 8))
    target = jax.random.normal(jax.random.key(1), (64, 8))
    module = Pair()
    params = module.init(jax.random.key(2), x)
    params, losses = train(module, params, lambda p: jnp.mean((module.apply(p, x) - target) ** 2), 300)
    assert losses[-1] < losses[0]
    conv = lambda x: LipschitzConv(16).apply({"params": params["params"]["conv"]}, x)  # noqa: E731
    dense = lambda x: LipschitzDense(8).apply({"params": params["params"]["dense"]}, x)  # noqa: E731
    conv_values, dense_values = singular_values(conv, (SIZE, SIZE, 8)), singular_values(dense, (SIZE * SIZE * 16,))
    assert conv_values[0] <= 1 + TOLERANCE and dense_values[0] <= 1 + TOLERANCE
    assert dense_values.min() > 0.9  # 8 outputs, all of them used
    # zero padding takes from whatever is shifted over the edge, so only most of the values of a padded map can be near 1
    assert np.median(conv_values) > 0.9


def make_transition(density, layers, constant=1.0):
    return DeepTransition(3, density, 5, 0.7, constant, layers) if layers else Transition(3, density, constant=constant)


@pytest.mark.parametrize(
    "density, z_shape, layers",
    [
        ("deterministic", (2, 2, 32), ()),
        pytest.param("normal", (2, 2, 32), (), marks=pytest.mark.slow),
        ("mixture_normal", (2, 2, 32), ()),
        ("mixture_normal", (1, 1, 80), ()),  # a vector: nothing is shifted, and there are more groups
        pytest.param("deterministic", (1, 1, 24), (40, 16), marks=pytest.mark.slow),
        ("mixture_normal", (2, 2, 8), (16,)),
    ],
)
def test_transition_is_k_lipschitz_with_noise_fixed(density, z_shape, layers):
    constant = 1.5
    module = make_transition(density, layers, constant)
    initial = module.init(jax.random.key(0), jnp.ones((1, *z_shape)), jnp.zeros(1, jnp.int32))
    keys = jax.random.split(jax.random.key(3), 5)

    @jax.jit
    def sample(params, z, action, key):
        return module.apply(params, z[None], action[None]).sample(key)[0]

    jacobian = jax.jit(jax.jacobian(sample, argnums=1))
    largest = 0.0
    for case, params in parameter_cases(initial).items():
        for i, action in enumerate((0, 1, 2)):
            action = jnp.asarray(action)
            z, far = 3 * jax.random.normal(keys[i], (2, *z_shape))
            matrix = jacobian(params, z, action, keys[4]).reshape(np.prod(z_shape), -1)
            norm = np.linalg.norm(np.asarray(matrix, np.float64), 2)
            assert norm <= constant * (1 + TOLERANCE), (case, norm)
            largest = max(largest, norm)
            for distance in (1.0, 100.0):
                gap = sample(params, z, action, keys[4]) - sample(params, z + distance * (far - z), action, keys[4])
                ratio = jnp.linalg.norm(gap) / (distance * jnp.linalg.norm(far - z))
                assert ratio <= constant * (1 + TOLERANCE), (case, ratio)
    assert largest > 0.3 * constant  # the bound is no vacuous one


@pytest.mark.parametrize(
    "density, shape, layers",
    [
        ("deterministic", (5, 5, 32), ()),
        ("normal", (5, 5, 32), ()),
        ("mixture_normal", (5, 5, 32), ()),
        ("mixture_normal", (1, 1, 128), ()),
        ("deterministic", (1, 1, 64), (32,)),
        ("normal", (5, 5, 8), (32, 16)),
    ],
)
def test_transition_starts_near_the_identity(density, shape, layers):
    module = make_transition(density, layers)
    z = nn.relu(jax.random.normal(jax.random.key(0), (6, *shape)))
    action = jnp.arange(6) % 3
    predicted = module.apply(module.init(jax.random.key(1), z, action), z, action)
    share = 1.0 if density == "deterministic" else 0.9
    error = jnp.linalg.norm(predicted.mean() - share * z) / jnp.linalg.norm(z)
    assert error < (0.2 if layers else 0.1), error


def test_reward_is_k_lipschitz_for_each_action():
    constant, z_shape = 0.7, (2, 2, 16)
    module = Reward(3, constant=constant, features=32)
    initial = module.init(jax.random.key(0), jnp.ones((1, *z_shape)), jnp.zeros(1, jnp.int32))

    @jax.jit
    def reward(params, z, action):
        return module.apply(params, z[None], action[None])[0]

    gradient = jax.jit(jax.grad(reward, argnums=1))
    for case, params in parameter_cases(initial).items():
        for action in range(3):
            z, far = 3 * jax.random.normal(jax.random.key(action), (2, *z_shape))
            norm = jnp.linalg.norm(gradient(params, z, jnp.asarray(action)))
            assert norm <= constant * (1 + TOLERANCE), (case, norm)
            gap = jnp.abs(reward(params, z, jnp.asarray(action)) - reward(params, far, jnp.asarray(action)))
            assert gap <= constant * (1 + TOLERANCE) * jnp.linalg.norm(z - far), case


def test_certified_layers_fit_a_batch_as_uncertified_ones_do():
    """The target is a 1-Lipschitz function, so the certificate need not cost anything."""
    x = jax.random.normal(jax.random.key(0), (128, 24))
    target = jnp.abs(x[:, :1]) - 0.5

    class Certified(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = group_sort(LipschitzDense(32)(x))
            return LipschitzScalars(1)(x)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(1)(x)

    final = {}
    for module in (Certified(), Plain()):
        params = module.init(jax.random.key(1), x)
        _, losses = train(module, params, lambda p, m=module: jnp.mean((m.apply(p, x) - target) ** 2), 2000)
        final[type(module).__name__] = (float(losses[0]), float(losses[-1]))
    (start, certified), (_, plain) = final["Certified"], final["Plain"]
    assert certified < 0.2 * start, final
    assert certified < 3 * plain + 0.02, final
