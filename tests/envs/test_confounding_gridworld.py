"""The gridworld's dynamics, pictures and exact values, by hand and by playing."""

import csv
import json
import re
import warnings
from dataclasses import replace
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import deep_mdp_ppo as deep_mdp
import deep_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.confounding_gridworld import (
    DOWN,
    ENV_ID,
    LEFT,
    RIGHT,
    TIME_LIMIT,
    UP,
    ConfoundingGridworld,
    build_model,
    frames,
    optimal_value,
    policy_value,
)
from tests.probes import make_iteration
from utils.runs.flags import UsageError, check_flags

GAMMA = 0.99


def deterministic_policy(model, action_at):
    policy = np.zeros((len(model.reward), 4), np.float32)
    for i, cell in enumerate(model.coordinates):
        policy[i, action_at.get(tuple(cell), RIGHT)] = 1.0
    return jnp.asarray(policy)


def test_start_values():
    model = build_model(5, 0.2, GAMMA)
    value = lambda at: policy_value(model, deterministic_policy(model, at), GAMMA)[model.start]  # noqa: E731
    assert_allclose(value({}), 4.8035, atol=1e-3)
    assert_allclose(value({(1, 5): UP}), 8.010, atol=1e-3)
    assert_allclose(value({(1, 5): UP, (3, 5): UP}), -1.088, atol=1e-3)
    assert_allclose(optimal_value(model, GAMMA)[model.start], 8.010, atol=1e-3)
    # by hand: the hazard is reached after one step and left after two; then n rewards of 1
    assert_allclose(value({}), sum(GAMMA**t for t in range(2, 7)), rtol=1e-5)


def test_dynamics_by_hand():
    model = build_model(3, 0.25, 0.9)
    assert model.grid == ("###G##", "#>>!W#", "I@#F##", "#>>!W#", "######")
    at = {tuple(cell): i for i, cell in enumerate(model.coordinates)}

    def outcome(cell, action):
        row = model.probability[at[cell], action]
        return {tuple(model.coordinates[i]): row[i] for i in np.flatnonzero(row)}, model.reward[at[cell], action]

    assert_allclose(model.probability.sum(-1), 1.0)
    assert outcome((2, 0), RIGHT) == ({(2, 1): 1.0}, 0.0)
    for action in (UP, DOWN, LEFT):
        assert outcome((2, 0), action) == ({(2, 0): 1.0}, 0.0)
        assert outcome((1, 1), action) == ({(1, 1): 1.0}, 0.0)
    for action in range(4):
        assert outcome((2, 1), action) == ({(1, 1): 0.75, (3, 1): 0.25}, 0.0)
    assert outcome((1, 2), RIGHT) == ({(1, 3): 1.0}, 1.0)
    assert outcome((3, 3), RIGHT) == ({(3, 4): 1.0}, 1.0)
    assert outcome((3, 3), DOWN) == ({(3, 3): 1.0}, 0.0)
    assert outcome((1, 3), UP) == ({(0, 3): 1.0}, pytest.approx(3 / 0.9**3))
    assert outcome((3, 3), UP) == ({(2, 3): 1.0}, pytest.approx(-1.75 * 3 / (0.25 * 0.9**3)))
    assert {tuple(c) for c in model.coordinates[model.terminal]} == {(0, 3), (1, 4), (2, 3), (3, 4)}
    assert (model.reward[model.terminal] == 0).all()


@settings(max_examples=200, deadline=None)
@given(n_path=st.sampled_from([2, 5, 9]), epsilon=st.floats(0.01, 1), gamma=st.floats(0.6, 0.99), seed=st.integers(0, 99))
def test_values_solve_bellmans_equation_and_none_beats_the_optimum(n_path, epsilon, gamma, seed):
    model = build_model(n_path, epsilon, gamma)
    policy = np.random.default_rng(seed).dirichlet(np.ones(4), len(model.reward)).astype(np.float32)
    value = np.asarray(policy_value(model, jnp.asarray(policy), gamma), np.float64)
    backup = np.sum(policy * (model.reward + gamma * model.probability @ value), axis=1)
    scale = np.abs(model.reward).max()
    assert_allclose(value, backup, atol=1e-4 * scale)
    assert (value <= optimal_value(model, gamma) + 1e-4 * scale).all()
    assert_array_equal(value[model.terminal], 0.0)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_monte_carlo_agrees_with_the_exact_value(seed):
    """10,000 episodes of a random policy; what a time limit cuts off is replaced by its exact value."""
    env = ConfoundingGridworld(10_000, seed)
    model = env.model
    logits = jax.random.normal(jax.random.key(seed), model.reward.shape) + jnp.array([0.0, 0.0, 0.0, 1.0])
    value = policy_value(model, jax.nn.softmax(logits), GAMMA)

    @jax.jit
    def play(state):
        def step(carry, key):
            state, running = carry
            action = jax.random.categorical(key, logits[state.cell])
            state, after = env.step(state, action)
            reward = jnp.where(running, after.reward, 0.0)
            left_over = jnp.where(running & after.truncated, value[state.cell], 0.0)
            return (state, running & ~(after.terminated | after.truncated)), (reward, left_over)

        keys = jax.random.split(jax.random.key(seed + 100), TIME_LIMIT)
        (_, running), outputs = jax.lax.scan(step, (state, jnp.ones(env.num_envs, bool)), keys)
        return running, outputs

    running, (rewards, left_over) = jax.device_get(play(env.reset()[0]))
    assert not running.any()
    discounts = GAMMA ** np.arange(TIME_LIMIT)[:, None]
    returns = np.sum(discounts * (rewards + GAMMA * left_over), axis=0)
    assert abs(returns.mean() - value[model.start]) <= 3 * returns.std() / 100


def test_steps_follow_the_protocol():
    """To the lower exit (epsilon 1 leads there always), the step that only resets, and on."""
    env = ConfoundingGridworld(2, 0, n_path=2, epsilon=1.0)
    state, obs = env.reset()
    step = jax.jit(env.step)
    trace = []
    for _ in range(6):
        state, after = step(state, jnp.array([RIGHT, LEFT]))
        trace.append(jax.device_get(after))
    at = lambda row, col: env.frames[[tuple(c) for c in env.model.coordinates].index((row, col))]  # noqa: E731
    for after, cell in zip(trace, [(2, 1), (3, 1), (3, 2), (3, 3), (2, 0), (2, 1)], strict=True):
        assert_array_equal(after.obs[0], at(*cell))
        assert_array_equal(after.obs[1], at(2, 0))
    assert [float(a.reward[0]) for a in trace] == [0, 0, 1, 1, 0, 0]
    assert [bool(a.terminated[0]) for a in trace] == [False] * 3 + [True, False, False]
    assert [bool(a.valid[0]) for a in trace] == [True] * 4 + [False, True]
    assert [int(a.episode.episode_length[0]) for a in trace] == [1, 2, 3, 4, 0, 1]
    assert float(trace[3].episode.episode_return[0]) == 2.0 and bool(trace[3].episode.finished[0])
    for a in trace:
        assert not a.truncated.any() and not a.terminated[1]


def test_time_limit_cuts_off_and_starts_anew():
    env = ConfoundingGridworld(1, 0)
    state, _ = env.reset()
    _, after = jax.lax.scan(lambda s, _: env.step(s, jnp.array([LEFT])), state, None, length=TIME_LIMIT + 2)
    assert_array_equal(np.flatnonzero(after.truncated[:, 0]), [TIME_LIMIT - 1])
    assert_array_equal(np.flatnonzero(~after.valid[:, 0]), [TIME_LIMIT])
    assert not after.terminated.any()
    assert int(after.episode.episode_length[TIME_LIMIT - 1, 0]) == TIME_LIMIT


def test_hazard_leads_down_as_often_as_epsilon_says():
    env = ConfoundingGridworld(20_000, 3, epsilon=0.2)
    state, _ = env.reset()
    step = jax.jit(lambda state: env.step(state, jnp.full(20_000, RIGHT))[0])  # without the frames, which take a second to draw
    for _ in range(2):
        state = step(state)
    below = np.mean(env.model.coordinates[state.cell, 0] == 3)
    assert abs(below - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5


@pytest.mark.parametrize("n_path", [2, 5, 81])
def test_frames_against_a_slow_drawing(n_path):
    model = build_model(n_path)
    drawn = frames(model)
    assert drawn.shape == (2 * n_path + 6, 1, 84, 84) and drawn.dtype == np.uint8
    shades = {"#": 50, ">": 100, "!": 100, "@": 180, "I": 120, "W": 200, "G": 220, "F": 220}
    for cell in (0, model.start, model.choices[1]):
        for y in range(0, 84, 5):
            for x in range(84):
                row, col = int(y * 5 / 84), x * (n_path + 3) // 84
                here = (row, col) == tuple(model.coordinates[cell])
                assert drawn[cell, 0, y, x] == (255 if here else shades[model.grid[row][col]])
    assert len({f.tobytes() for f in drawn}) == len(drawn)  # even with a column for each pixel, none is left out


@pytest.mark.parametrize(
    "flags", [{"n_path": 1}, {"n_path": 82}, {"epsilon": 0.0}, {"epsilon": 1.1}, {"gamma": 0.0}, {"gamma": 1.0}]
)
def test_bad_sizes_are_refused(flags):
    (name,) = flags
    with pytest.raises(ValueError, match=f"^{name} .*must lie"):
        build_model(**flags)


@pytest.mark.parametrize("flags", [{"n_path": 81, "gamma": 1e-4}, {"n_path": 20, "gamma": 0.3}, {"epsilon": 1e-39}])
def test_rewards_too_large_are_refused(flags):
    with pytest.raises(ValueError, match="^n_path .*rewards of up to"):
        build_model(**flags)


def test_gymnasium_environment():
    for mode in (None, "rgb_array", "ansi"):
        env = gymnasium.make(ENV_ID, render_mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=mode is None)
    env.reset()
    for action in (-1, 4):
        with pytest.raises(ValueError, match="must be an integer from 0 to 3"):
            env.unwrapped.step(action)
    assert env.render() == "#####G##\n#>>>>!W#\nA@###F##\n#>>>>!W#\n########\n"
    picture = gymnasium.make(ENV_ID, render_mode="rgb_array")
    picture.reset()
    assert picture.render().shape == (420, 420, 3) and picture.render().dtype == np.uint8


def test_gymnasium_environment_is_the_jax_one():
    single = gymnasium.make(ENV_ID, n_path=3, epsilon=1.0)
    many = ConfoundingGridworld(1, 0, n_path=3, epsilon=1.0)
    step = jax.jit(many.step)
    obs, _ = single.reset(seed=0)
    state, first = many.reset()
    assert_array_equal(obs, first[0])
    for action in (UP, RIGHT, DOWN, RIGHT, RIGHT, LEFT, UP):
        obs, reward, terminated, truncated, _ = single.step(action)
        state, after = step(state, jnp.array([action]))
        assert_array_equal(obs, after.obs[0])
        assert_allclose(reward, after.reward[0], rtol=1e-6)
        assert (terminated, truncated) == (bool(after.terminated[0]), bool(after.truncated[0]))
    assert terminated and reward < -3
    _, *rest = [single.reset()] + [single.step(LEFT) for _ in range(TIME_LIMIT)]
    assert [r[3] for r in rest] == [False] * (TIME_LIMIT - 1) + [True]


def with_vectors(env):
    """Cells seen as unit vectors: encoders of frames take most of the time to compile."""
    env.frames = np.eye(len(env.frames), dtype=np.float32)
    env.obs_spec = jax.ShapeDtypeStruct(env.frames.shape[1:], env.frames.dtype)
    return env


def test_flags_reach_the_environment():
    args = ppo.Args(env_id=ENV_ID, num_envs=3, seed=7, gridworld_n_path=3, gridworld_epsilon=0.4, gamma=0.9)
    env, expected = ppo.make_env(args), build_model(3, 0.4, 0.9)
    assert env.num_envs == 3 and env.gamma == 0.9 and env.seed != ppo.make_env(replace(args, seed=8)).seed
    assert_array_equal(env.model.probability, expected.probability)
    assert_array_equal(env.model.reward, expected.reward)


@pytest.mark.parametrize(
    "script", [pytest.param(ppo, marks=pytest.mark.slow), pytest.param(deep_mdp, marks=pytest.mark.slow), deep_spi]
)
def test_scripts_log_the_exact_value_of_their_policy(script):
    code = {"latent": "categorical", "num_categories": 4, "num_classes": 4, "fc_layers": (16,)}
    args = script.Args(env_id=ENV_ID, num_envs=8, num_steps=8, num_minibatches=2, total_timesteps=128, **code)
    check_flags(args)
    env = with_vectors(script.make_env(args))
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    state = jax.jit(lambda: script.init_state(args, env, agent, optimizer))()
    state, metrics = make_iteration(script, env, agent, optimizer, args)(state)

    @jax.jit
    def act(params):
        z = agent.encoder.apply(params.encoder, jnp.asarray(env.frames))
        return z, jax.nn.softmax(agent.actor_critic.apply(params.actor_critic, z)[0])

    z, policy = jax.device_get(act(state.params))
    policy = policy.astype(np.float64)
    value = np.zeros(16)
    for _ in range(3000):  # the slow, obvious way
        value = np.sum(policy * (env.model.reward + GAMMA * env.model.probability @ value), axis=1)
    assert_allclose(metrics["charts/init_value"], value[env.model.start], rtol=1e-3, atol=1e-3)
    assert_allclose(metrics["values/3_5"], value[env.model.choices[1]], rtol=1e-3)
    different = np.sum(z[env.model.choices[0]] != z[env.model.choices[1]])  # two numbers for each variable that differs
    assert different > 0
    assert_allclose(metrics["charts/representation_distance"], np.sqrt(different), rtol=1e-5)
    assert metrics["charts/distinct_latents"] == len({x.tobytes() for x in z}) > 1
    picture = metrics["charts/policy_matrix"]
    assert picture.shape == (12 * 16, 4 * 16)
    assert_allclose(picture[8::16, 8::16] / 255, policy[~env.model.terminal], atol=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo, deep_spi])
def test_benchmark_trains_as_the_script_does(script):
    """Its short cut, the encoder evaluated once for each cell, changes no parameter by more than rounding."""
    from experiments import confounding_gridworld as benchmark

    small = {"num_envs": 8, "num_steps": 8, "num_minibatches": 2, "fc_layers": (32,), "total_timesteps": 64 * 3}
    args = script.Args(env_id=ENV_ID, latent="categorical", num_categories=4, num_classes=4, **small)
    env = script.make_env(args)
    cells, pictures = benchmark.make_cells(args)
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    short_cut = agent._replace(encoder=benchmark.OncePerCell(agent.encoder, pictures))
    results = []
    for environment, networks in ((env, agent), (cells, short_cut)):
        state = script.init_state(args, environment, networks, optimizer)
        rollout = jax.jit(partial(script.rollout, env=environment, agent=networks, args=args))
        learn = jax.jit(partial(script.learn, env=environment, agent=networks, optimizer=optimizer, args=args))
        for _ in range(3):
            state, metrics = learn(*rollout(state))
        results.append((state.params, metrics["charts/init_value"]))
    (params, value), (other_params, other_value) = results
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        assert_allclose(a, b, atol=2e-5)
    assert_allclose(value, other_value, atol=1e-3)


def test_benchmark_writes_figure_and_numbers(tmp_path, monkeypatch):
    from experiments import confounding_gridworld as benchmark

    make = benchmark.make_env
    monkeypatch.setattr(benchmark, "make_env", lambda args: with_vectors(make(args)))
    args = benchmark.Args(output=str(tmp_path / "grid"), seeds=(1, 2), algorithms=("PPO",), total_timesteps=2048)
    benchmark.main(args)
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    (numbers,) = [v for k, v in json.loads((tmp_path / "grid.json").read_text()).items() if k != "device"]
    assert numbers["steps"] == [1024, 2048]
    finals = numbers["final value"]["seeds"]
    assert finals[0] != finals[1]
    assert_allclose(numbers["charts/init_value"]["mean"][-1], np.mean(finals), atol=1e-3)
    # Student's t with one degree of freedom, by hand: 12.706 * |a - b| / 2
    assert_allclose(numbers["final value"]["95% interval"], 12.706 * abs(finals[0] - finals[1]) / 2, rtol=1e-3)
    for mistake in ({"algorithms": ("SARSA",)}, {"seeds": (1, 1)}, {"seeds": ()}, {"latent": "continuous", "num_classes": 3}):
        with pytest.raises(UsageError, match=f"^--{list(mistake)[-1].replace('_', '-')} ?"):
            benchmark.main(benchmark.Args(**mistake))


def test_sensitivity_trains_the_missing_cells(tmp_path, monkeypatch, capsys):
    from experiments import confounding_gridworld as benchmark
    from experiments import gridworld_sensitivity as sensitivity

    make, train, trained = benchmark.make_env, sensitivity.train, []
    monkeypatch.setattr(benchmark, "make_env", lambda args: with_vectors(make(args)))

    def interrupted(name, args):
        if len(trained) == 1:
            raise KeyboardInterrupt
        return counted(name, args)

    def counted(name, args):
        trained.append((args.clip_coef, args.seeds))
        return train(name, args)

    args = sensitivity.Args(
        x=("clip-coef", "0.01", "0.3"), y=("gridworld-n-path", "3"), seeds=(1, 2), algorithms=("PPO",),
        total_timesteps=2048, output=str(tmp_path / "grid"),
    )  # fmt: skip
    monkeypatch.setattr(sensitivity, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.main(args)
    monkeypatch.setattr(sensitivity, "train", counted)
    sensitivity.main(args)
    assert trained == [(0.01, (1, 2)), (0.3, (1, 2))]
    curves = train("PPO", replace(args, clip_coef=0.3, gridworld_n_path=3))[benchmark.VALUE]
    *_, value, _ = list(csv.DictReader((tmp_path / "grid.csv").open()))[-1].values()
    assert_allclose(float(value), curves[1, -1], rtol=1e-5)  # the last tenth of two updates is the last one
    assert f"mean {curves[:, -1].mean():.2f}" in capsys.readouterr().out.splitlines()[-2]
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    sensitivity.main(replace(args, seeds=(2, 3)))
    assert trained[2:] == [(0.01, (3,)), (0.3, (3,))]

    (tmp_path / "grid.csv").write_text("command,seed,value,distinct_latents\na,1,,2\n")
    for change, said in (
        ({}, f"{tmp_path / 'grid.csv'}: is damaged"),
        ({"x": ()}, "--x and --y: name a flag"),
        ({"x": ("clip-coef",)}, "--x clip-coef: name at least one value"),
        ({"x": ("clip-coef", "0.1", "0.10")}, "--x clip-coef: name at least one value, and each once"),
        ({"x": ("clip-coef", "-1")}, "--clip-coef -1.0"),
        ({"x": ("gamma", "1")}, "--gamma: --x can be clip-coef"),
        ({"x": args.y}, "--x and --y: both are gridworld-n-path"),
        ({"x": ("transition-loss-coef", "0", "1")}, "--x transition-loss-coef --y gridworld-n-path: PPO does not read"),
        ({"algorithms": ("PPO", "DeepMDP")}, "--algorithms: name one"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            sensitivity.main(replace(args, **change))
