"""DreamSPI: dreams in a world model that is known, who learns from what, the discriminator, pictures, and a probe."""

from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

import deep_spi
import dream_spi
from envs.confounding_gridworld import RIGHT, build_model, optimal_value, policy_value
from networks.architectures import ACTIVATIONS, RANGES, ActorCritic, to_range
from networks.discriminator import TotalVariationCritic, WassersteinCritic
from tests.networks.test_lipschitz import TOLERANCE, parameter_cases
from tests.probes import CueEnv, make_iteration
from tests.test_algorithms import Identity
from utils.distributions import Categorical, Deterministic
from utils.dreams import replay, traces
from utils.dreams.discriminator import transition_distance
from utils.dreams.traces import trace_dreams
from utils.metrics import rollout_metrics
from utils.runs.flags import check_flags

GAMMA = 0.99
WORLD = build_model(5, 0.2, GAMMA)
value_of = jax.jit(lambda policy: policy_value(WORLD, policy, GAMMA))


class Lookup(nn.Module):
    """Rows of a constant table by the cell that z marks (and the action, where given)."""

    table: tuple
    wrap: object = lambda rows: rows

    def __call__(self, z, action=None):
        rows = jnp.einsum("nz,z...->n...", z[:, 0], jnp.asarray(self.table, jnp.float32))
        return self.wrap(rows if action is None else rows[jnp.arange(len(z)), action])


class Hard(nn.Module):
    """As `Lookup`, for a distribution whose samples are one-hot."""

    table: tuple

    def __call__(self, z, action):
        rows = jnp.einsum("nz,z...->n...", z[:, 0], jnp.asarray(self.table, jnp.float32))
        return Categorical(rows[jnp.arange(len(z)), action][:, None])


def nested(array):
    return tuple(nested(a) for a in array) if np.ndim(array) else float(array)


def known_world(critic):
    """The gridworld's true dynamics as world model, a policy that mostly goes right, and `critic` [S] as its critic."""
    model, policy = WORLD, np.full((16, 4), 0.02, np.float32)
    policy[:, RIGHT] = 0.94
    value = np.asarray(value_of(jnp.asarray(policy)))
    log = lambda p: np.log(np.maximum(p, 1e-30))  # noqa: E731
    ends = model.probability @ model.terminal.astype(float)  # an end follows from cell and action here
    logits = np.where(ends > 0.5, 50.0, -50.0)
    table = np.column_stack([log(policy), critic(value)])
    actor = Lookup(nested(table), lambda rows: (rows[:, :4], rows[:, 4]))
    transition = Hard(nested(log(model.probability)))
    agent = dream_spi.Agent(None, actor, transition, Lookup(nested(model.reward)), Lookup(nested(logits)), None)
    return model, value, agent, dream_spi.Params(None, {}, {}, {}, {}, None)


@pytest.mark.parametrize("soft_done", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dreams_in_the_true_model_have_its_exact_values(soft_done):
    """Returns of 6,000 dreams from the start, of 150 steps, without a critic: within 4 standard errors."""
    model, value, agent, params = known_world(lambda value: 0.0 * value)
    args = dream_spi.Args(imagination_horizon=150, soft_done=soft_done, latent="categorical")
    z = jnp.asarray(np.eye(16, dtype=np.float32)[np.full(6000, model.start)][:, None])

    @jax.jit
    def dream(z):
        dreams = dream_spi.imagine(params, z, jnp.ones(len(z)), jax.random.key(0), agent, args)
        return dreams, dream_spi.dream_advantages(dreams, GAMMA, 1.0)

    dreams, advantages = jax.device_get(dream(z))
    discounts = GAMMA ** np.arange(150)[:, None]
    returns = np.sum(discounts * dreams.weight * dreams.reward, axis=0)
    assert abs(returns.mean() - value[model.start]) <= 4 * returns.std() / 6000**0.5 + 1e-3
    assert np.mean(dreams.weight[-1]) < 0.01  # all but a few had ended
    # with lambda 1 and no critic the first advantage is the return
    assert_allclose(advantages[0], returns, atol=1e-2)


def drawn(shapes):
    """Parameters of these shapes, drawn by NumPy: to compile what initializes them takes seconds."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), x.dtype), shapes)


@pytest.mark.parametrize("world_model", ["fc", *(pytest.param(w, marks=pytest.mark.slow) for w in ("transformer", "softmoe"))])
def test_dreams_stay_among_the_codes_with_gumbel_softmax_too(world_model):
    flags = {"world_model": world_model, "use_gumbel_softmax": True, "gumbel_temperature": 3.0}
    args = dream_spi.Args(latent="categorical", num_categories=3, num_classes=4, fc_layers=(8,), imagination_horizon=4, **flags)
    check_flags(args)
    agent = dream_spi.make_agent(args, 3)
    obs = jax.random.normal(jax.random.key(1), (6, 5))
    params = drawn(jax.eval_shape(partial(dream_spi.init_params, agent=agent), jax.random.key(0), obs=obs))

    @jax.jit
    def dream(params):
        z = agent.encoder.apply(params.encoder, obs)
        assert agent.transition.apply(params.transition, z, jnp.zeros(6, jnp.int32)).temperature == 3.0
        return dream_spi.imagine(params, z, jnp.ones(6), jax.random.key(2), agent, args)

    z = np.asarray(dream(params).z)
    assert z.shape == (4, 6, 3, 4)
    assert_array_equal(z.max(-1), 1.0)
    assert_array_equal(z.sum(-1), 1.0)


def test_exact_critics_see_no_advantage_on_average():
    """A dream of one step bootstraps from the critic: with the exact one the mean advantage is 0 in each cell."""
    model, value, agent, params = known_world(lambda value: value)
    args = dream_spi.Args(imagination_horizon=3, latent="categorical")
    cells = np.repeat(np.flatnonzero(~model.terminal), 5000)
    z = jnp.asarray(np.eye(16, dtype=np.float32)[cells][:, None])

    @jax.jit
    def first_advantages(z):
        dreams = dream_spi.imagine(params, z, jnp.ones(len(z)), jax.random.key(1), agent, args)
        return dream_spi.dream_advantages(dreams, GAMMA, 0.95)[0]

    advantages = np.asarray(first_advantages(z))
    for cell in np.unique(cells):
        of = advantages[cells == cell]
        assert abs(of.mean()) <= 4 * of.std() / len(of) ** 0.5 + 1e-3, cell


def test_learns_the_optimum_in_dreams_of_the_true_model():
    """Actor and critic from scratch, in dreams of 8 steps that start in all cells."""
    model, _, agent, params = known_world(lambda value: 0.0 * value)
    args = dream_spi.Args(
        num_envs=64, total_timesteps=512 * 120, latent="categorical", heads_learning_rate=5e-4, real_value_coef=0.0
    )
    actor_critic = ActorCritic(4, (64,))
    agent = agent._replace(encoder=Identity(), actor_critic=actor_critic)
    cells, alive = jnp.eye(16)[:, None], jnp.asarray(np.flatnonzero(~model.terminal))
    params = params._replace(encoder={}, actor_critic=jax.jit(actor_critic.init)(jax.random.key(0), cells))
    optimizers = dream_spi.make_optimizer(args)
    opt_state = jax.jit(lambda params: dream_spi.Optimizers(*(optimizer.init(params) for optimizer in optimizers)))(params)
    state = dream_spi.TrainState(params, opt_state, None, None, None, None, jnp.zeros((), jnp.int32))

    @jax.jit
    def iteration(state, key):
        cell_key, key = jax.random.split(key)
        obs = cells[jax.random.choice(cell_key, alive, (9, 64))]
        steps = deep_spi.Rollout(obs, jnp.zeros((9, 64)), *[None] * 5, jnp.ones((8, 64), bool), None, jnp.zeros((8, 64), bool))
        zeros = jnp.zeros((8, 64))
        state, _ = dream_spi.update_heads(state, steps, zeros, key, agent, optimizers, args)
        return state._replace(iteration=state.iteration + 1)

    for k in range(120):
        state = iteration(state, jax.random.key(k))
    logits, value = jax.jit(actor_critic.apply)(state.params.actor_critic, cells)
    reached = np.asarray(value_of(nn.softmax(logits)))
    best = optimal_value(model, GAMMA)
    assert best[model.start] > 8.0
    assert reached[model.start] > 0.98 * best[model.start]
    assert_allclose(np.asarray(value)[alive], reached[alive], atol=0.5)


def test_dreams_stay_where_what_is_real_can_be():
    """A transition that leaves the range of relu, rewards of 7 where the environment pays at most 2, values of 1000."""

    class Away(nn.Module):
        def __call__(self, z, action):
            return Deterministic(z - 1.0)

    class Of(nn.Module):
        value: float

        def __call__(self, z, action=None):
            of_all = jnp.full(len(z), self.value)
            return of_all if action is not None else (jnp.zeros((len(z), 2)), of_all)

    agent = dream_spi.Agent(None, Of(1000.0), Away(), Of(7.0), Of(-50.0), None, reward_range=(0.0, 2.0))
    params, z = dream_spi.Params(None, {}, {}, {}, {}, None), jnp.full((3, 1, 1, 4), 1.5)
    args = dream_spi.Args(imagination_horizon=3, gamma=0.9)
    for bounded, latents, reward, value in ((True, (1.5, 0.5, 0.0), 2.0, 20.0), (False, (1.5, 0.5, -0.5), 7.0, 1000.0)):
        flags = replace(args, bounded_dreams=bounded)
        dreams = dream_spi.imagine(params, z, jnp.ones(3), jax.random.key(0), agent, flags)
        assert_allclose(dreams.z[:, 0, 0, 0, 0], latents)
        assert_allclose(dreams.reward, reward), assert_allclose(dreams.value, value, rtol=1e-5)
    for activation, (low, high) in RANGES.items():
        x = jnp.linspace(-9, 9, 2001)
        seen = ACTIVATIONS[activation](x)
        assert low <= seen.min() <= low + 0.01 and seen.max() <= high
        assert_array_equal(to_range(x, replace(args, activation=activation)), jnp.clip(x, low, high))


def test_dream_advantages_by_hand():
    """Three steps, the second ends; gamma 0.5, lambda 0.5."""
    column = lambda *x: jnp.asarray(x, jnp.float32)[:, None]  # noqa: E731
    dreams = dream_spi.Dreams(None, column(1, 2, 4, 8), None, None, column(1, 3, 5), column(1, 0, 1), column(1, 1, 0))
    # errors: 1 + 0.5*2 - 1 = 1;  3 - 2 = 1;  5 + 0.5*8 - 4 = 5
    assert_allclose(dream_spi.dream_advantages(dreams, 0.5, 0.5)[:, 0], [1.25, 1.0, 5.0])
    # with a probability of 0.5 to go on after the second: 3 + 0.25*4 - 2 = 2, and 0.125 of what follows
    soft = dreams._replace(going_on=column(1, 0.5, 1))
    assert_allclose(dream_spi.dream_advantages(soft, 0.5, 0.5)[:, 0], [1 + 0.25 * 2.625, 2.625, 5.0])


class Heads(nn.Module):
    """Logits w z_0 and 0, value z_1."""

    @nn.compact
    def __call__(self, z, obs=None):
        w = self.param("w", nn.initializers.ones, ())
        return jnp.stack([w * z[:, 0], jnp.zeros_like(z[:, 0])], 1), z[:, 1]


def test_heads_loss_by_hand():
    args = dream_spi.Args(norm_adv=False, clip_coef=0.2, clip_vloss=False, real_value_coef=0.25)
    batch = dream_spi.HeadsBatch(
        z=jnp.array([[0.0, 0.5], [np.log(3.0), 0.0], [7.0, 7.0]]), action=jnp.array([0, 1, 0]),
        log_prob=jnp.log(jnp.array([0.4, 0.25, 0.5])), value=jnp.array([0.5, 0.0, 3.0]), advantage=jnp.array([2.0, -1.0, 9.0]),
        target=jnp.array([2.5, -1.0, 12.0]),
        weight=jnp.array([1.0, 0.5, 0.0]), real_target=jnp.array([2.5, 0.0, 0.0]), real_weight=jnp.array([1.0, 0.0, 0.0]),
    )  # fmt: skip
    params = dream_spi.Params(None, {"params": {"w": 1.0}}, None, None, None, None)
    agent = dream_spi.Agent(None, Heads(), None, None, None, None)
    loss, metrics = dream_spi.heads_loss(params, batch, agent, args)
    # ratios 1.25 (clipped to 1.2) and 1; the third step counts for nothing
    policy_loss = (-2 * 1.2 + 0.5 * 1.0) / 1.5
    entropy = (np.log(2) - 0.5 * (0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 1.5
    value_loss = (0.5 * 2.0**2 + 0.5 * 0.5 * 1.0) / 1.5
    assert_allclose(metrics["dreams/policy_loss"], policy_loss, rtol=1e-5)
    assert_allclose(metrics["dreams/entropy"], entropy, rtol=1e-5)
    assert_allclose(metrics["dreams/value_loss"], value_loss, rtol=1e-5)
    assert_allclose(metrics["dreams/real_value_loss"], 0.5 * 2.0**2)  # of the only latent that was not dreamed
    assert_allclose(loss, policy_loss - 0.01 * entropy + 0.5 * (value_loss + 0.25 * 2.0), rtol=1e-5)
    # a value that has moved from 0.5 to 0.9, by more than 0.2, towards a target of 2.5: as if it were at 0.7
    batch = batch._replace(z=batch.z.at[0, 1].set(0.9))
    for flags, first, second in (
        ({"clip_vloss": True}, 0.5 * 1.8**2, 0.5),
        ({"use_huber": True}, 1.6 - 0.5, 0.5),
        ({"clip_vloss": True, "use_huber": True}, 1.8 - 0.5, 0.5),
    ):
        _, metrics = dream_spi.heads_loss(params, batch, agent, replace(args, **flags))
        assert_allclose(metrics["dreams/value_loss"], (first + 0.5 * second) / 1.5, rtol=1e-5)


class SmallEncoder(nn.Module):
    """One matrix, and relu. Programs of small networks compile faster: the time is in proportion to their operations."""

    @nn.compact
    def __call__(self, obs):
        return nn.relu(obs @ self.param("w", nn.initializers.normal(1.0), (obs.shape[1], 16)))[:, None, None]


class PerAction(nn.Module):
    """A matrix for each of three actions: to a distribution of the next latent, or to one number."""

    distribution: object = None

    @nn.compact
    def __call__(self, z, action):
        flat = z.reshape(len(z), -1)
        w = self.param("w", nn.initializers.normal(0.1), (3, flat.shape[1], flat.shape[1] if self.distribution else 1))
        x = jnp.einsum("nc,na,aco->no", flat, nn.one_hot(action, 3), w)
        return self.distribution(x.reshape(z.shape)) if self.distribution else x[:, 0]


class SmallCritic(nn.Module):
    """As `PerAction`, for the discriminator."""

    @nn.compact
    def __call__(self, z, action, next_z):
        return PerAction()(jnp.concatenate([z, next_z], axis=-1), action)


CODE = {"latent": "categorical", "num_categories": 4, "num_classes": 4}


def dream_setup(real=False, **flags):
    """What a script sets up; unless `real`, with small networks of continuous latents in place of its own."""
    flags = (CODE | {"fc_layers": (32,)} if real else {"fc_layers": ()}) | flags
    args = dream_spi.Args(num_envs=16, num_steps=8, total_timesteps=128 * 40, imagination_horizon=3, **flags)
    check_flags(args)
    env = CueEnv(16)
    agent = dream_spi.make_agent(args, env.num_actions, env.obs_parts)._replace(reward_range=env.reward_range)
    if not real:
        small = {"encoder": SmallEncoder(), "transition": PerAction(Deterministic), "reward": PerAction(), "end": PerAction()}
        agent = agent._replace(**small, discriminator=agent.discriminator and SmallCritic())
    optimizers = dream_spi.make_optimizer(args)
    return args, env, agent, optimizers, dream_spi.init_state(args, env, agent, optimizers)


def changed(before, after):
    """The names in two records, or dictionaries, under which anything differs."""
    before, after = (trees if isinstance(trees, dict) else trees._asdict() for trees in jax.device_get((before, after)))
    return {
        name
        for name in before
        if any(np.any(a != b) for a, b in zip(*(jax.tree.leaves(p[name]) for p in (before, after)), strict=True))
    }


MODEL = {"encoder", "transition", "reward", "end"}
ALTERNATING = {"dreams_from": "replay", "imagination_epochs": 1}
REPLAY = {"use_replay_buffer": True, "replay_prefill": 128, "replay_batch_size": 16, "replay_length": 4}
REAL = [
    pytest.param({}, set(), marks=pytest.mark.slow),
    pytest.param({"progressive": "linear"}, {"actor_critic"}, marks=pytest.mark.slow),
    pytest.param(
        REPLAY | {"wasserstein_discriminator": True, "discriminator_steps": 2}, {"discriminator"}, marks=pytest.mark.slow
    ),
    (REPLAY | ALTERNATING | {"slow_critic": 0.9, "end_loss": "huber"}, {"actor_critic", "slow_critic"}),
]


def gather_experience(state, env, agent, args):
    """A rollout, stored, and its advantages."""
    state, steps = dream_spi.rollout(state, env, agent, args)
    state = state._replace(replay=replay.add(state.replay, steps, args))
    return state, steps, dream_spi.compute_gae(steps, args.gamma, args.gae_lambda)


@pytest.fixture(scope="module")
def recorded():
    """A rollout of the small networks, and its first minibatch."""
    args, env, agent, _, state = dream_setup()

    @jax.jit
    def record(state):
        _, steps, advantages = gather_experience(state, env, agent, args)
        first, where = (x[0] for x in deep_spi.minibatch_indices(jax.random.key(1), args))
        return deep_spi.gather(steps, advantages, first, where, args)

    return record(state)


def prefill_iteration(state, env, agent, args):
    return dream_spi.prefill(*dream_spi.rollout(state, env, agent, args), env, agent, args)


@pytest.mark.parametrize("flags, real", REAL)
def test_each_update_changes_its_own_parameters_alone(flags, real):
    """To the bit, twice over, so that no moment of the optimizers moves what has no gradient."""
    args, env, agent, optimizers, state = dream_setup(**flags)
    given = {"agent": agent, "optimizers": optimizers, "args": args}
    update_model, update_heads = (jax.jit(partial(f, **given)) for f in (dream_spi.update_model, dream_spi.update_heads))
    state = state._replace(iteration=jnp.asarray(10))  # where progressive learns from both
    state, steps, advantages = jax.jit(partial(gather_experience, env=env, agent=agent, args=args))(state)
    for k in range(2):
        after_model, _ = update_model(state, steps, advantages, jax.random.key(10 + k))
        assert changed(state.params, after_model.params) == MODEL | real
        if args.dreams_from == "replay":
            state = after_model
            continue
        after_heads, _ = update_heads(after_model, steps, advantages, jax.random.key(20 + k))
        assert changed(after_model.params, after_heads.params) == {"actor_critic"}
        state = after_heads


@pytest.fixture(scope="module")
def heads():
    """What learns in dreams: with and without normalized returns, compiled for both tests."""
    flags = {"decoupled_layers": True, "fc_layers": (8,), "slow_critic": 0.75, "actor_after": 5 * 128}
    flags |= {"norm_adv": False, "ent_coef": 0.0, "bounded_dreams": False, "imagination_epochs": 1}
    args, env, agent, optimizers, state = dream_setup(**flags)
    params = state.params._replace(slow_critic=jax.tree.map(lambda x: 40.0 * x, jax.device_get(state.params.actor_critic)))
    z = jax.jit(agent.encoder.apply)(params.encoder, env.reset()[1])
    awake = jnp.ones(16).at[3].set(0.0)

    def learner(norm):
        given = {"agent": agent, "optimizers": optimizers, "args": replace(args, norm_returns=norm)}
        learn = jax.jit(partial(dream_spi.dream_and_learn, **given))
        return lambda iteration: learn(params, state.opt_state, z, awake, awake, jax.random.key(0), iteration)

    return args, agent, params, z, awake, {norm: learner(norm) for norm in (False, True)}


def test_slow_critic_and_normalized_returns(heads):
    """Dreams bootstrap from the slow critic, which then follows; advantages are divided by the range of the dreamed returns."""
    args, agent, params, z, awake, learners = heads

    @jax.jit
    def imagine(params, key):
        dreams = dream_spi.imagine(params, z, awake, jax.random.split(key)[0], agent, args)
        value = agent.actor_critic.apply(params.slow_critic, z)[1]
        return value, dreams, dream_spi.dream_advantages(dreams, args.gamma, args.gae_lambda)

    value, dreams, advantages = jax.device_get(imagine(params, jax.random.key(0)))
    assert_allclose(dreams.value[0], value, rtol=1e-5)
    of = {}
    for norm, learn in learners.items():
        (after, _), of[norm] = learn(10)
        assert changed(params, after) == {"actor_critic", "slow_critic"}
        slow, learned = jax.device_get((params.slow_critic, after.actor_critic))
        follows = jax.tree.map(lambda slow, new: 0.75 * slow + 0.25 * new, slow, learned)
        jax.tree.map(partial(assert_allclose, rtol=1e-6, atol=1e-7), after.slow_critic, follows)
    counted = (dreams.value[:-1] + advantages)[dreams.weight > 0]
    low, high = np.quantile(counted, (0.05, 0.95), method="inverted_cdf")
    assert high - low > 1.5
    assert_allclose(of[True]["dreams/policy_loss"] * (high - low), of[False]["dreams/policy_loss"], rtol=1e-3)


def test_the_actor_waits_for_the_model(heads):
    """Before --actor-after nothing moves it, to the bit, while the critic learns; then it learns as ever."""
    _, _, params, _, _, learners = heads
    moved = {}
    for iteration in (4, 5):
        after = learners[False](iteration)[0][0].actor_critic
        moved[iteration] = changed(params.actor_critic["params"], after["params"])
    assert moved == {4: {"critic", "critic_hidden"}, 5: {"critic", "critic_hidden", "actor", "hidden"}}


def test_the_discriminator_learns_from_its_own_loss_alone(recorded):
    """Its steps change nothing else, and the others' losses, whose gradients do reach it, leave it as it is."""
    args, _, agent, optimizers, state = dream_setup(wasserstein_discriminator=True, discriminator_steps=3)
    rates, key = dream_spi.Optimizers(*[1e-3] * 4), jax.random.key(2)
    given = {"agent": agent, "optimizers": optimizers, "rates": rates, "args": args}

    @jax.jit
    def updates(params, opt_state, batch):
        after, opt_state = dream_spi.update_discriminator(params, opt_state, batch, key, **given)
        ended = jnp.zeros(len(batch.action), bool)
        grads, _ = jax.grad(dream_spi.model_loss, has_aux=True)(after, batch, ended, 1.0, key, agent, args)
        others = [dream_spi.descend(name, grads, rates, after, opt_state, optimizers)[0] for name in ("model", "heads")]
        return after, grads.discriminator, *others

    params, grads, model, heads = updates(state.params, state.opt_state, recorded)
    assert changed(state.params, params) == {"discriminator"}
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))
    assert changed(params, model) == MODEL
    assert changed(params, heads) == {"actor_critic"}


def sharpened(args, agent, z, next_z, predicted, steps):
    """The distance that a discriminator sees between `next_z` and samples of `predicted`, after so many gradient steps."""
    agent = agent._replace(encoder=Given(jnp.concatenate([z, next_z])), transition=Given(predicted))
    optimizers = dream_spi.make_optimizer(args)
    n = len(z)
    batch = deep_spi.Minibatch(None, jnp.arange(n) % 2, None, None, None, None, None, jnp.ones(n, bool), jnp.zeros(n, bool))
    given = {"agent": agent, "optimizers": optimizers, "args": replace(args, discriminator_steps=steps)}
    given["rates"] = dream_spi.Optimizers(*[1e-3] * 4)

    @jax.jit
    def seen(key):
        critic = agent.discriminator.init(key, z[:1], jnp.zeros(1, jnp.int32), z[:1])
        params = dream_spi.Params({}, {}, {}, {}, {}, critic)
        opt_state = dream_spi.Optimizers(*(optimizer.init(params) for optimizer in optimizers))
        params, _ = dream_spi.update_discriminator(params, opt_state, batch, jax.random.key(1), **given)
        distance = transition_distance(agent.discriminator, params.discriminator, z, batch.action)
        return distance(predicted, next_z, jax.random.key(2), args)

    return np.asarray(seen(jax.random.key(0)))


class Given(nn.Module):
    """Returns what it was given."""

    what: object

    def __call__(self, *inputs, **named):
        return self.what


def test_the_discriminator_sees_the_wasserstein_distance():
    """Points that lie 3 apart, in a direction that depends on the latent: no pair looks further apart than that."""
    args = dream_spi.Args(wasserstein_discriminator=True)
    z = jax.random.normal(jax.random.key(3), (64, 1, 1, 16))
    next_z = z + 3.0 * jnp.sign(z[..., :1]) * jnp.eye(16)[1]
    agent = dream_spi.Agent(*[None] * 5, WassersteinCritic(2, features=128))
    seen = sharpened(args, agent, z, next_z, Deterministic(z), 300)
    assert np.max(np.abs(seen)) <= 3.0 * (1 + 1e-4)
    assert np.mean(seen) >= 2.9


def test_the_discriminator_sees_the_total_variation_distance():
    """The real next code is always the first class, the predicted one that with probability 0.7: total variation 0.3."""
    args = dream_spi.Args(wasserstein_discriminator=True, latent="categorical")
    z = jax.nn.one_hot(jnp.arange(512) % 3, 3)[:, None]
    next_z = jnp.zeros_like(z).at[..., 0].set(1.0)
    predicted = Categorical(jnp.broadcast_to(jnp.log(jnp.array([0.7, 0.2, 0.1])), z.shape))
    agent = dream_spi.Agent(*[None] * 5, TotalVariationCritic(2))
    seen = sharpened(args, agent, z, next_z, predicted, 100)
    assert np.max(np.abs(seen)) <= 1.0
    assert abs(np.mean(seen) - 0.3) <= 0.07  # the standard error of 512 samples is 0.02


def test_the_wasserstein_discriminator_is_1_lipschitz_for_all_parameters():
    """In the next latent, for every latent and action: its gradient's norm at random points, and distant pairs."""
    critic, keys = WassersteinCritic(3, features=16), jax.random.split(jax.random.key(0), 4)
    z, near = (3.0 * jax.random.normal(k, (40, 3, 3, 2)) for k in keys[:2])
    far = near + 30.0 * jax.random.normal(keys[2], near.shape)
    action = jnp.arange(40) % 3

    @jax.jit
    def measured(params):
        value = partial(critic.apply, params, z, action)
        near_value, pull_back = jax.vjp(value, near)
        return near_value, pull_back(jnp.ones(40))[0].reshape(40, -1), value(far), value(jnp.zeros_like(near))

    apart = np.linalg.norm(np.asarray(far - near).reshape(40, -1), axis=1)
    for case, params in parameter_cases(jax.jit(critic.init)(keys[3], z, action, near)).items():
        if case == "x1e25":  # what z adds is not finite any more
            continue
        near_value, gradient, far_value, shift = jax.device_get(measured(params))  # rounding is relative to the shift
        slopes = np.linalg.norm(gradient, axis=1)
        assert np.max(slopes) <= 1 + TOLERANCE, case
        if case == "initial":
            assert np.min(slopes) >= 0.8
        assert np.all(np.abs(far_value - near_value) - apart <= TOLERANCE * (1 + np.abs(shift))), case


def test_traces_of_dreams_by_hand():
    """z' = z + 1 beside real latents that move by 2: the error grows by 1 a step, until the episode ends."""

    class Plus(nn.Module):
        def __call__(self, z, action):
            return Deterministic(z + 1.0)

    class FirstOf(nn.Module):
        def __call__(self, z, action):
            return z.reshape(len(z), -1)[:, 0] + action

    args = dream_spi.Args(num_steps=4, imagination_horizon=3, bounded_dreams=False)
    table = lambda *rows, dtype=jnp.float32: jnp.asarray(rows, dtype).T  # noqa: E731
    obs = table([0, 2, 4, 6, 8], [5, 7, 1, 3, 5])[..., None, None, None]
    ends = table([0, 0, 0, 0], [1, 0, 0, 0], dtype=bool)  # the second environment's first step; then a dummy step
    steps = deep_spi.Rollout(
        obs=obs,
        value=jnp.zeros((5, 2)),
        action=table([0, 1, 0, 1], [0, 0, 0, 0], dtype=jnp.int32),
        log_probs=None,
        reward=table([1, 2, 3, 4], [7, 6, 7, 8]),
        terminated=ends,
        truncated=jnp.zeros_like(ends),
        valid=table([1, 1, 1, 1], [1, 0, 1, 1], dtype=bool),
        episode=None,
        unseen_end=table([0, 0, 0, 0], [0, 0, 0, 0], dtype=bool),
    )
    agent = dream_spi.Agent(Identity(), None, Plus(), FirstOf(), FirstOf(), None)
    params = dream_spi.Params({}, None, {}, {}, {}, None)
    trace = partial(trace_dreams, agent=agent, args=args, dream_step=dream_spi.dream_step)
    taken = jax.jit(trace)(params, steps, jax.random.key(0))
    of = {name.removeprefix(traces.PREFIX): np.asarray(x) for name, x in taken.items()}
    assert_array_equal(of["alive"], np.array([[1, 1, 1], [1, 0, 0]]).T)
    assert_allclose(of["error"][:, 0], [1, 2, 3])
    assert_allclose(of["no_change"][:, 0], [2, 4, 6])
    assert_allclose(of["error"][0, 1], 1.0)
    assert_allclose(of["dreamed_reward"][:, 0], [0 + 0, 1 + 1, 2 + 0])
    assert_allclose(of["reward"], np.array([[1, 2, 3], [7, 6, 7]]).T)
    assert_allclose(of["dreamed_end"][:, 0], jax.nn.sigmoid(jnp.array([0.0, 2.0, 2.0])), rtol=1e-6)
    assert_array_equal(of["end"], np.array([[0, 0, 0], [1, 0, 0]]).T)

    # the second environment has 7 and an end, the first 6; it dreams of 5, 6, 7, 8, and all but 8 were seen (4 is no nearer)
    assert of["example"] == 1
    assert_array_equal(of["taken"], [0, 0, 0])
    assert_allclose(of["frames"][:, 0, 0, 0], [5, 7, 1, 3])
    assert_allclose(of["like"][:, 0, 0, 0], [5, 6, 7, 8])

    taken = {name: np.asarray(x) for name, x in taken.items()}
    # rewards 1, 2, 3 and 7, of variance 5.1875, dreamed as 0, 2, 2 and 5
    expected = {
        "dreams/latent_error": (1 + 2 + 3 + 1) / (2 + 4 + 6 + 2),
        "dreams/explained_reward": 1 - (1 + 0 + 1 + 4) / 4 / 5.1875,
    }
    assert traces.measures(taken) == pytest.approx(expected)
    nothing = dict.fromkeys(taken, np.zeros((3, 2)))
    assert traces.measures(nothing) == {}

    figure = traces.draw(taken)
    axes = {axes.get_title(): axes for axes in figure.axes}
    real, dreamed = axes["reward of each step"].lines  # the mean of those that live
    assert_allclose(real.get_ydata(), [4, 2, 3])
    assert_allclose(dreamed.get_ydata(), [(0 + 5) / 2, 2, 2])
    assert_allclose(figure.axes[-1].lines[0].get_ydata(), [1 / 2, 2 / 4, 3 / 6])
    columns = [axes for axes in figure.axes if axes.get_title().startswith("step")]
    assert [axes.get_xlabel() for axes in columns] == ["reward 7\nepisode ends", "", ""]


def test_shares_of_real_data_and_dreams():
    """Of a rate of 1 that is not annealed, and what is left of the others."""
    args = dream_spi.Args(
        num_envs=8, num_steps=8, total_timesteps=64 * 10, anneal_heads_lr=False, learning_rate=1.0, heads_learning_rate=1.0,
        discriminator_learning_rate=2.0,
    )  # fmt: skip
    expected = {
        ("none", False): [(0, 1)] * 3,
        ("none", True): [(1, 1)] * 3,
        ("linear", False): [(1, 0), (0.5, 0.5), (0, 1)],
        ("exponential", False): [(1, 0), (1 - 0.9 / 0.99, 0.9 / 0.99), (0, 1)],
        ("late", False): [(1, 1e-8), (1 - 1e-4, 1e-4), (0, 1)],
    }
    for (progressive, dyna), values in expected.items():
        for iteration, (real, dreams) in zip((0, 5, 10), values, strict=True):
            flags = replace(args, progressive=progressive, dyna_style=dyna)
            found = dream_spi.learning_rates(jnp.asarray(iteration), flags)
            assert_allclose([found.model, found.discriminator], [1 - iteration / 10, 2 - iteration / 5], atol=1e-6)
            assert_allclose([found.real_heads, found.heads], [real, dreams], atol=1e-6)
            # what comes before the first update is no part of the schedule
            filled = replace(flags, use_replay_buffer=True, replay_prefill=320, total_timesteps=64 * 15)
            found = dream_spi.learning_rates(jnp.asarray(iteration + 5), filled)
            assert_allclose([found.model, found.real_heads, found.heads], [1 - iteration / 10, real, dreams], atol=1e-6)
    found = dream_spi.learning_rates(jnp.asarray(5), replace(args, anneal_heads_lr=True, progressive="linear", anneal_lr=False))
    assert_allclose([found.model, found.real_heads, found.heads], [1.0, 0.25, 0.25], atol=1e-6)


def test_rates_and_clipping_of_single_networks():
    """One step of Adam moves each parameter by its rate; a network's clipped gradient does not depend on the others'."""
    flags = {"encoder_learning_rate": 3e-3, "learning_rate": 1e-3, "critic_learning_rate": 4e-3, "heads_learning_rate": 2e-3}
    flags |= {"decoupled_layers": True, "fc_layers": (8,), "weight_decay": 0.0, "adam_eps": 1e-12}
    args, _, _, optimizers, state = dream_setup(**flags)
    grads, rates = jax.tree.map(jnp.ones_like, state.params), dream_spi.learning_rates(jnp.asarray(0), args)
    step_of = lambda name: lambda p: dream_spi.descend(name, grads, rates, p, state.opt_state, optimizers)[0]  # noqa: E731
    of = lambda name: jax.jit(step_of(name))(state.params)  # noqa: E731

    def moved(before, after):
        pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (before, after)), strict=True)
        return [np.max(np.abs(a - b)) for a, b in pairs]

    after = of("model")
    assert_allclose(moved(state.params.encoder, after.encoder), 3e-3, rtol=1e-3)
    assert_allclose(moved(state.params.reward, after.reward), 1e-3, rtol=1e-3)
    after, before = of("heads").actor_critic["params"], state.params.actor_critic["params"]
    for name, rate in (("actor", 2e-3), ("hidden", 2e-3), ("critic", 4e-3), ("critic_hidden", 4e-3)):
        assert_allclose(moved(before[name], after[name]), rate, rtol=1e-3)
    huge = grads._replace(transition=jax.tree.map(lambda g: 1e6 * g, grads.transition))
    for apart, expected in ((True, 1.0), (False, 0.0)):  # beside a large epsilon Adam's step is in proportion to the gradient
        optimizers = dream_spi.make_optimizer(replace(args, clip_apart=apart, adam_eps=1.0))
        at_one = dream_spi.Optimizers(*[1.0] * 4)

        @jax.jit
        def step(params, grads, optimizers=optimizers, at_one=at_one):
            states = dream_spi.Optimizers(*(optimizer.init(params) for optimizer in optimizers))
            return dream_spi.descend("model", grads, at_one, params, states, optimizers)[0].reward

        first, second = (np.sum(moved(state.params.reward, step(state.params, g))) for g in (grads, huge))
        assert first > 1e-3
        assert_allclose(second / first, expected, atol=0.05)


def test_ends_by_hubers_loss_stand_in_the_utility(recorded):
    """Of the probability given the next latent, weighted as rewards are; its gradient reaches the encoder."""
    args, _, agent, _, state = dream_setup(
        end_loss="huber", end_loss_coef=2.0, transition_loss_coef=0.5, reward_loss_coef=0.25, value_aware_coef=0.0
    )
    batch, key = recorded, jax.random.key(2)
    ended = jnp.arange(len(batch.action)) % 3 == 0

    @jax.jit
    def losses(params):
        z = agent.encoder.apply(params.encoder, batch.obs)[-len(ended) :]
        probability = nn.sigmoid(agent.end.apply(params.end, z, jnp.zeros_like(batch.action)))
        loss = lambda params: dream_spi.model_loss(params, batch, ended, 1.0, key, agent, args)[0]  # noqa: E731
        without = lambda params: deep_spi.loss_fn(params, batch, key, agent, args)[0]  # noqa: E731
        return probability, jax.value_and_grad(loss)(params), jax.value_and_grad(without)(params)

    probability, (found, grads), (without, grads_without) = jax.device_get(losses(state.params))
    of_each = 0.5 * (probability - np.asarray(ended)) ** 2  # below 1
    added = 2.0 * 0.25 * np.mean(of_each[np.asarray(batch.valid)])
    assert_allclose(found - without, added, rtol=1e-4)
    assert {"end", "encoder"} <= changed(grads, grads_without)
    largest = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), grads.encoder, grads_without.encoder)
    assert max(jax.tree.leaves(largest)) > 1e-4


@pytest.mark.parametrize("model, of_data", [(None, 1.1), (0.05, 1.05)])
def test_real_data_and_dreams_are_clipped_apart(model, of_data, recorded):
    """All ratios are 1.15. Where the advantage is positive it counts 1.1 times in dreams, and on real data as much as
    `model_clip_coef` lets it; where it is negative, 1.15 times."""
    flags = {"model_clip_coef": model, "transition_loss_coef": 0.0, "reward_loss_coef": 0.0, "value_aware_coef": 0.0}
    args, _, agent, _, state = dream_setup(norm_adv=False, **flags)
    check_flags(args)
    batch = recorded._replace(log_probs=recorded.log_probs - np.log(1.15))

    @jax.jit
    def metrics(params):
        _, on_data = dream_spi.model_loss(params, batch, jnp.zeros_like(batch.valid), 1.0, jax.random.key(2), agent, args)
        z = agent.encoder.apply(params.encoder, batch.obs)[: len(batch.action)]
        log_prob = jnp.take_along_axis(batch.log_probs, batch.action[:, None], axis=1)[:, 0]
        valid = batch.valid.astype(jnp.float32)
        value, advantage, target = batch.value, batch.advantage, batch.target
        dreams = dream_spi.HeadsBatch(z, batch.action, log_prob, value, advantage, target, valid, target, valid)
        return on_data | dream_spi.heads_loss(params, dreams, agent, args)[1]

    found = metrics(state.params)
    advantage = np.asarray(batch.advantage)[np.asarray(batch.valid)]
    assert (advantage > 0).any() and (advantage < 0).any()
    by_hand = lambda most: np.mean(np.where(advantage > 0, -most * advantage, -1.15 * advantage))  # noqa: E731
    assert_allclose(found["losses/policy_loss"], by_hand(of_data), rtol=1e-4)
    assert_allclose(found["dreams/policy_loss"], by_hand(1.1), rtol=1e-4)


def test_predictions_learn_the_values_of_what_followed(recorded):
    """Half the squared error of the critic at the next latent as it is dreamed, and no network but the transition learns from
    it."""
    args, _, agent, _, state = dream_setup(value_aware_coef=2.0)
    batch, key = recorded, jax.random.key(2)
    assert not batch.valid.all()
    n = len(batch.action)
    ended = jnp.arange(n) % 5 == 0

    @jax.jit
    def losses(params):
        z = agent.encoder.apply(params.encoder, batch.obs)
        dreamed = jnp.maximum(agent.transition.apply(params.transition, z[:n], batch.action).loc, 0.0)
        value = lambda z: agent.actor_critic.apply(params.actor_critic, z)[1]  # noqa: E731

        def loss(params, coef):
            return dream_spi.model_loss(params, batch, ended, 1.0, key, agent, replace(args, value_aware_coef=coef))[0]

        return value(dreamed) - value(z[-n:]), *(jax.value_and_grad(loss)(params, coef) for coef in (2.0, 0.0))

    errors, (found, grads), (without, grads_without) = jax.device_get(losses(state.params))
    counted = np.asarray(batch.valid & ~ended)
    assert_allclose(found - without, np.mean(errors[counted] ** 2), rtol=1e-3)
    assert changed(grads, grads_without) == {"transition"}


def test_dreams_that_count_for_nothing_leave_real_data_alone():
    """At a rate of 0 dreams move neither the heads nor the moments that move them on real data."""
    args, _, _, optimizers, state = dream_setup(progressive="linear")
    params = jax.device_get(state.params)
    real, dreams = (jax.tree.map(lambda x, s=s: np.full_like(x, s), params) for s in (0.1, -0.1))
    rates = dream_spi.learning_rates(jnp.asarray(0), args)
    by_real, by_dreams = (
        jax.jit(lambda *carry, name=name, grads=grads: dream_spi.descend(name, grads, rates, *carry, optimizers))
        for name, grads in (("real_heads", real), ("heads", dreams))
    )
    once = by_real(params, state.opt_state)
    between = by_dreams(*once)
    jax.tree.map(assert_array_equal, once[0], between[0])
    jax.tree.map(assert_array_equal, by_real(*between)[0], by_real(*once)[0])


def fast(real):
    """Flags with which the small networks, or the real ones, learn a probe in 40 updates."""
    rate = 2e-3 if real else 1e-2
    return {"learning_rate": rate, "heads_learning_rate": rate, "transition_loss_coef": 0.1, "real": real}


def learn(state, env, agent, optimizers, args, iterations):
    iteration, history = make_iteration(dream_spi, env, agent, optimizers, args), []
    for _ in range(iterations):
        state, metrics = iteration(state)
        history.append(jax.device_get(metrics))
    return state, history


@cache
def prefilled(off_policy, real):
    """A buffer of 8 rollouts after its first, which nothing was learned from."""
    flags = {"dyna_style": True, "replay_capacity": 8 * 128, "replay_ratio": 4.0, "off_policy": off_policy}
    args, env, agent, optimizers, state = dream_setup(**fast(real), **REPLAY, **flags)
    after, metrics = jax.jit(partial(prefill_iteration, env=env, agent=agent, args=args))(state)
    return args, env, agent, optimizers, state, after, metrics


def test_prefill_fills_the_buffer_and_learns_nothing():
    args, _, _, _, state, after, metrics = prefilled("vtrace", False)
    jax.tree.map(assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert after.iteration == 1 and after.replay.current_index == args.num_steps
    assert metrics["charts/episodes"] > 0 and not any(name.startswith(("losses/policy", "dreams/")) for name in metrics)


@pytest.mark.parametrize(
    "off_policy, real",
    [("vtrace", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("vtrace", "clipped_ratio"))],
)
def test_learns_a_probe_from_replayed_data_alone(off_policy, real):
    """Without dreams; what is replayed is up to 8 rollouts old."""
    args, env, agent, optimizers, _, state, _ = prefilled(off_policy, real)

    @jax.jit
    def iteration(state):
        key, update_key = jax.random.split(state.key)
        state, steps, advantages = gather_experience(state._replace(key=key), env, agent, args)
        state, _ = dream_spi.update_model(state, steps, advantages, update_key, agent, optimizers, args)
        achieved = rollout_metrics(state.params, steps, advantages, env, agent)["charts/episodic_return"]
        return state._replace(iteration=state.iteration + 1), achieved

    returns = []
    for _ in range(38):
        state, achieved = iteration(state)
        returns.append(float(achieved))
    assert returns[0] < 0.7
    assert np.mean(returns[-5:]) > 0.95


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_learns_a_probe_in_dreams_alone(real):
    args, env, agent, optimizers, state = dream_setup(**fast(real), n_imagination_rollouts=2, imagination_epochs=2)
    state, history = learn(state, env, agent, optimizers, args, 40)
    assert history[0]["charts/episodic_return"] < 0.7
    assert np.mean([h["charts/episodic_return"] for h in history[-5:]]) > 0.95
    assert_allclose(history[-1]["dreams/length"], 1.0, atol=0.05)  # the predictor knows that episodes are one step long
    assert_array_equal(state.iteration, 40)
    assert all(np.isfinite(v) for h in history for v in h.values())


def test_an_observation_is_drawn_as_what_it_is():
    """RGB images of either layout in their colors; of stacked frames the last one."""
    image = np.arange(3 * 64 * 64, dtype=np.float32).reshape(3, 64, 64) / (3 * 64 * 64)
    frames = np.arange(4 * 84 * 84).reshape(4, 84, 84).astype(np.uint8)
    for obs, drawn in (
        (image, np.moveaxis(image, 0, -1)),
        (np.moveaxis(image, 0, -1), np.moveaxis(image, 0, -1)),
        (frames, frames[-1]),
        (np.moveaxis(frames, 0, -1), frames[-1]),
    ):
        axes = Figure().subplots()
        traces.show_observation(axes, obs, 1.0)
        assert_array_equal(np.asarray(axes.images[0].get_array()), drawn)
