"""Every certified layer, materialised as a matrix, has norm at most 1; the whole transition and reward are K-Lipschitz."""

from functools import partial

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
from utils.distributions import count_maps

TOLERANCE = 1e-4
SIZE = 4  # of the feature maps that are materialised


def init(module, *inputs):
    """Parameters from a fixed key, by one program: operations compiled one by one take ten times as long."""
    return jax.jit(module.init)(jax.random.key(0), *inputs)


def images(f, shape):
    """The linear part of the affine map f, exactly: the images of the unit vectors, as rows."""
    n = int(np.prod(shape))
    *rows, zero = np.asarray(f(np.eye(n + 1, n, dtype=np.float32).reshape(n + 1, *shape)), np.float64)
    return (np.stack(rows) - zero).reshape(n, *zero.shape)


def singular_values(f, shape):
    """Of the linear part of the affine map f."""
    rows = images(f, shape)
    return np.linalg.svd(rows.reshape(len(rows), -1), compute_uv=False)


def parameter_cases(params):
    """Random, tiny, huge, rank-deficient, zero, and badly scaled parameters."""
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(7)
    normal = [rng.normal(size=p.shape).astype(np.float32) for p in leaves]
    cases = {
        "initial": leaves,
        "x1000": [1000 * p for p in leaves],
        "x0.001": [0.001 * p for p in leaves],
        "x1e-25": [1e-25 * p for p in leaves],
        "x1e25": [1e25 * p for p in leaves],
        "normal": normal,
        "ones": [np.ones_like(p) for p in leaves],
        "zeros": [np.zeros_like(p) for p in leaves],
        "scales": [p * np.logspace(-6, 3, p.shape[0], dtype=np.float32).reshape(-1, *(1,) * (p.ndim - 1)) for p in normal],
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
    apply = jax.jit(layer.apply)
    for case, params in parameter_cases(init(layer, jnp.ones((1, *shape)))).items():
        values = singular_values(partial(apply, params), shape)
        assert values[0] <= 1 + TOLERANCE, (case, values[0])
        if case in ("initial", "x1000", "x0.001", "x1e-25", "x1e25"):
            assert values[0] >= 0.9, (case, values[0])


def test_scalars_are_each_one_lipschitz():
    layer = LipschitzScalars(3)
    apply = jax.jit(layer.apply)
    for case, params in parameter_cases(init(layer, jnp.ones((1, 10)))).items():
        for norm in np.linalg.norm(images(partial(apply, params), (10,)), axis=0):
            assert norm <= 1 + TOLERANCE and (case == "zeros" or norm >= 0.999), (case, norm)


def test_polynomial_keeps_the_unit_interval_and_lifts_most_of_it():
    s = np.linspace(0, 1, 1_000_001)
    lifted = s * np.polynomial.polynomial.polyval(s**2, COEFFICIENTS)
    assert lifted.min() >= 0 and lifted.max() <= 1
    assert lifted[s >= 0.3].min() >= 0.95


made_orthogonal = jax.jit(orthogonal)


@settings(max_examples=20, deadline=None)
@given(shape=st.sampled_from([(12, 5), (4, 7), (1, 1)]), scale=st.floats(-4, 4), seed=st.integers(0, 99))
def test_orthogonal_bounds_one_matrix_and_each_of_a_batch(shape, scale, seed):
    """Of few shapes, because each of them is compiled, twice."""
    kernels = (10.0**scale * np.random.default_rng(seed).normal(size=(*shape, 3)) ** 3).astype(np.float32)
    batched = np.asarray(made_orthogonal(kernels))
    for b in range(3):
        single = np.asarray(made_orthogonal(kernels[..., b]))
        np.testing.assert_allclose(batched[..., b], single, atol=1e-4)
        assert np.linalg.norm(np.asarray(single, np.float64), 2) <= 1 + TOLERANCE


@pytest.mark.parametrize("batch", [(), (3,)])
def test_orthogonal_of_several_is_that_of_each(batch):
    shapes = (6, 4), (4, 6), (5, 5), (6, 4), (2, 7)
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(*shape, *batch)).astype(np.float32) for shape in shapes]
    together, each = jax.jit(lambda *kernels: (orthogonal_all(*kernels), [orthogonal(kernel) for kernel in kernels]))(*kernels)
    for made, expected in zip(together, each, strict=True):
        np.testing.assert_allclose(made, expected, atol=1e-5)


def test_projection_and_gradients_are_finite_at_zero():
    kernels = np.random.default_rng(0).normal(size=(8, 4, 2)).astype(np.float32)
    p = np.asarray(jax.jit(lambda kernels: projection(orthogonal(kernels)))(kernels), np.float64)
    for b in range(2):
        values = np.linalg.eigvalsh(p[..., b])
        assert values.min() >= -TOLERANCE and values.max() <= 1 + TOLERANCE
    grads = jax.jit(jax.grad(lambda *args: jnp.sum(orthogonal_conv_kernel(*args)), argnums=(0, 1, 2)))(
        *[np.zeros((8, 4, 2), np.float32)] * 3
    )
    assert all(np.isfinite(g).all() for g in grads)
    x = jnp.ones((2, 5))
    for layer in (LipschitzDense(3), LipschitzScalars(3)):
        params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(layer.init, jax.random.key(0), x))
        grads = jax.jit(jax.grad(lambda p, layer=layer: layer.apply(p, x).sum()))(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_products_written_for_batches_have_the_gradients_of_plain_ones():
    from networks import lipschitz

    rng = np.random.default_rng(0)
    a, b, w = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4, 2, 6), (4, 5, 2, 6), (7, 3)))
    plain = lambda a, b: jnp.einsum("mk...,kn...->mn...", a, b)  # noqa: E731

    @jax.jit
    def gradients(a, b, w):
        products = [jax.grad(lambda a, b, f=f: jnp.sum(jnp.sin(f(a, b))), argnums=(0, 1)) for f in (lipschitz.matmul, plain)]
        grams = [jax.grad(lambda w, f=f: jnp.sum(jnp.sin(f(w)))) for f in (lipschitz.gram, lambda w: w.T @ w)]
        return [(*product(a, b), gram(w)) for product, gram in zip(products, grams, strict=True)]

    for actual, expected in zip(*gradients(a, b, w), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_group_sort_permutes():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    y = np.asarray(jax.jit(group_sort)(x))
    np.testing.assert_array_equal(np.sort(np.asarray(x)), np.sort(y))
    assert (y[:, :4] <= y[:, 4:]).all()


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
    params, losses = train(module, init(module, x), lambda p: jnp.mean((module.apply(p, x) - target) ** 2), 300)
    assert losses[-1] < losses[0]
    layers = (LipschitzConv(16), "conv", (SIZE, SIZE, 8)), (LipschitzDense(8), "dense", (SIZE * SIZE * 16,))
    applied = [partial(jax.jit(layer.apply), {"params": params["params"][name]}) for layer, name, _ in layers]
    conv_values, dense_values = (singular_values(f, shape) for f, (_, _, shape) in zip(applied, layers, strict=True))
    assert conv_values[0] <= 1 + TOLERANCE and dense_values[0] <= 1 + TOLERANCE
    assert dense_values.min() > 0.9  # 8 outputs, all of them used
    # zero padding takes from whatever is shifted over the edge, so only most of the values of a padded map can be near 1
    assert np.median(conv_values) > 0.9


def make_transition(density, layers, constant=1.0):
    return DeepTransition(3, density, 2, 0.7, constant, layers) if layers else Transition(3, density, constant=constant)


def aligned(params, density):
    """Scales that change as the locations do, with slope 1: the noise then decides whether a sample is K-Lipschitz. Only one
    component has weight, because the scale of an average of several is flatter."""
    params = jax.tree.map(np.array, params["params"])
    components, _ = count_maps(density, len(params.get("mixture", [[0]])[0]))
    if components > 1:
        params["mixture"][:, 0] = 50.0
    params["bias"][:, components:] = 20.0  # far to the right, softplus has slope 1
    if "dense" in params:  # the locations turn the hidden map back into |z|
        params["dense"][:, :, :, components:] = params["dense"][:, :, :, :components]
        return {"params": params}
    params["kept"][:], params["changed"][:], params["action_0"][:] = 10.0, 0.0, 0.0
    eye = np.eye(params["kept"].shape[1], dtype=np.float32)  # here the layer and each map do so
    mirror = np.concatenate([eye, -eye], axis=1)
    for name, kernel in {"layer_0": mirror, **{f"map_{k}": -mirror.T for k in range(params["bias"].shape[1])}}.items():
        params[name]["dense"] = kernel
        params[name]["bias"][:] = 0.0
        for shifts in ("vertical", "horizontal"):
            params[name][shifts] = np.concatenate([eye, eye])
    return {"params": params}


@pytest.mark.parametrize(
    "density, z_shape, layers",
    [
        ("deterministic", (1, 1, 80), ()),  # a vector: nothing is shifted, and there are more groups
        ("mixture_normal", (2, 2, 32), ()),
        ("mixture_normal", (2, 2, 8), (16,)),
        pytest.param("deterministic", (2, 2, 32), (), marks=pytest.mark.slow),
        pytest.param("normal", (2, 2, 32), (), marks=pytest.mark.slow),
        pytest.param("mixture_normal", (1, 1, 80), (), marks=pytest.mark.slow),
        pytest.param("deterministic", (1, 1, 24), (40, 16), marks=pytest.mark.slow),
    ],
)
def test_transition_is_k_lipschitz_with_noise_fixed(density, z_shape, layers):
    constant = 1.5
    module = make_transition(density, layers, constant)
    cases = parameter_cases(init(module, jnp.ones((1, *z_shape)), jnp.zeros(1, jnp.int32)))
    if len(layers) < 2:
        cases["aligned"] = aligned(cases["initial"], density)

    @jax.jit
    @partial(jax.jacobian, argnums=1, has_aux=True)
    def jacobian(params, z, action, key):
        after = module.apply(params, z[None], action[None]).sample(key)[0]
        return after, after

    rng, key, largest = np.random.default_rng(3), jax.random.key(3), {}
    for case, params in cases.items():
        norms = []
        for action in np.arange(3, dtype=np.int32):
            z, far = 3 * rng.normal(size=(2, *z_shape)).astype(np.float32)
            points = [z, *(z + distance * (far - z) for distance in np.float32([1, 100]))]
            matrices, samples = zip(*(jacobian(params, point, action, key) for point in points), strict=True)
            matrices = np.asarray(matrices, np.float64).reshape(3, z.size, z.size)
            norms += list(np.linalg.norm(matrices, 2, axis=(1, 2)))
            for point, after in zip(points[1:], samples[1:], strict=True):
                gap = np.linalg.norm(np.asarray(samples[0] - after, np.float64))
                norms.append(gap / np.linalg.norm(points[0] - point))
        largest[case] = np.max(norms)  # of which a NaN is the largest
    assert all(norm <= constant * (1 + TOLERANCE) for norm in largest.values()), largest
    assert largest["initial"] > 0.3 * constant  # the bound is no vacuous one
    assert len(layers) > 1 or largest["aligned"] > 0.97 * constant, largest


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
    z = np.maximum(np.random.default_rng(0).normal(size=(6, *shape)), 0).astype(np.float32)
    action = np.arange(6, dtype=np.int32) % 3
    predicted = jax.jit(lambda *args: module.init_with_output(jax.random.key(1), *args)[0].mean())(z, action)
    share = 1.0 if density == "deterministic" else 0.9
    error = np.linalg.norm(predicted - share * z) / np.linalg.norm(z)
    assert error < (0.2 if layers else 0.1), error


def test_reward_is_k_lipschitz_for_each_action():
    constant, z_shape = 0.7, (2, 2, 16)
    module = Reward(3, constant=constant, features=32)
    initial = init(module, jnp.ones((1, *z_shape)), jnp.zeros(1, jnp.int32))

    @jax.jit
    @partial(jax.value_and_grad, argnums=1)
    def reward(params, z, action):
        return module.apply(params, z[None], action[None])[0]

    rng = np.random.default_rng(0)
    for case, params in parameter_cases(initial).items():
        for action in np.arange(3, dtype=np.int32):
            z, far = 3 * rng.normal(size=(2, *z_shape)).astype(np.float32)
            (here, gradient), (there, _) = (reward(params, x, action) for x in (z, far))
            norm = np.linalg.norm(gradient)
            assert norm <= constant * (1 + TOLERANCE), (case, norm)
            assert abs(here - there) <= constant * (1 + TOLERANCE) * np.linalg.norm(z - far), case


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
        _, losses = train(module, init(module, x), lambda p, m=module: jnp.mean((m.apply(p, x) - target) ** 2), 2000)
        final[type(module).__name__] = (float(losses[0]), float(losses[-1]))
    (start, certified), (_, plain) = final["Certified"], final["Plain"]
    assert certified < 0.2 * start, final
    assert certified < 3 * plain + 0.02, final
