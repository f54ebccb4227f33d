"""All scripts and world models on MinAtar's games, and many runs in one program."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import deep_mdp_ppo as deep_mdp
import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from benchmarks.throughput import WORLD_MODELS
from envs.minatar import GAMES
from envs.registry import make_env
from experiments import seeds
from experiments.study.records import COLUMNS, RunRecord, final_score, last_tenth, read_runs, typed_flags
from utils.dreams.replay import prefill_iterations
from utils.files import locked, write_csv
from utils.runs.flags import UsageError, check_flags, make_args
from utils.runs.stored_flags import to_store

pytestmark = pytest.mark.minatar

SMALL = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 3 * 128}


def train(script, args, run_seeds=(1,)):
    """The metrics of three updates, for each seed."""
    check_flags(args)
    env = make_env(args)
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    act = jax.jit(lambda state: script.rollout(state, env, agent, args), donate_argnums=0)
    improve = jax.jit(lambda *rolled: script.learn(*rolled, env, agent, optimizer, args), donate_argnums=0)
    fill = jax.jit(lambda *rolled: script.prefill(*rolled, env, agent, args), donate_argnums=0)
    logged = []
    for seed in run_seeds:
        seeded = replace(args, seed=seed)
        state = script.init_state(seeded, make_env(seeded), agent, optimizer)
        for k in range(3):
            state, metrics = (fill if k < prefill_iterations(args) else improve)(*act(state))
            logged.append(jax.device_get(metrics))
    return logged


@pytest.mark.slow
@pytest.mark.parametrize("env_id", GAMES)
@pytest.mark.parametrize("script", [ppo, deep_mdp, deep_spi, dream_spi])
def test_every_script_runs_on_every_game(script, env_id):
    for metrics in train(script, make_args(script.Args, env_id=env_id, **SMALL)):
        losses = {name: value for name, value in metrics.items() if name.startswith(("losses/", "dreams/"))}
        assert losses and all(np.isfinite(value).all() for value in losses.values())


@pytest.mark.slow
@pytest.mark.parametrize("flags", WORLD_MODELS)
@pytest.mark.parametrize("script", [deep_mdp, deep_spi])
def test_every_world_model_runs(script, flags):
    logged = train(script, make_args(script.Args, env_id="SpaceInvaders-MinAtar", **SMALL, **flags))
    assert all(np.isfinite(metrics["losses/transition_loss"]) for metrics in logged)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo, {}),
        (deep_spi, {"transition_loss_coef": 0.1}),
        (dream_spi, {"dyna_style": True}),
        (dream_spi, {"use_replay_buffer": True, "replay_prefill": 128, "replay_length": 8, "replay_batch_size": 4}),
    ],
)
def test_runs_in_one_program_are_those_of_the_script(script, flags):
    """The same episodes and returns as one run after the other; those with another learning rate are others."""
    small = dict(SMALL)
    if "use_replay_buffer" in flags:  # whose minibatches have another size
        del small["num_minibatches"]
    args = make_args(script.Args, env_id="Breakout-MinAtar", **small, **flags)
    runs = [{"seed": seed, "learning_rate": rate} for rate in (args.learning_rate, 0.1) for seed in (1, 7)]
    returns = seeds.train(script, args, runs)
    assert returns.mean.shape == returns.episodes.shape == (3, 4) and returns.finite.all()
    logged = train(script, args, (1, 7))
    for i, metrics in enumerate((logged[:3], logged[3:])):
        np.testing.assert_array_equal(returns.episodes[:, i], [row["charts/episodes"] for row in metrics])
        np.testing.assert_allclose(returns.mean[:, i], [row["charts/episodic_return"] for row in metrics], rtol=1e-5)
    episodes = returns.episodes
    assert np.any(episodes[:, :2] != episodes[:, 2:]) and np.any(episodes[:, 0] != episodes[:, 1])


def test_a_run_that_diverges_is_named_and_left_out_of_means(tmp_path, monkeypatch, capsys):
    """Two seeds with a learning rate of 1e30 and two with the default, which is called so."""
    flags = "--num-envs 8 --num-steps 64 --total-timesteps 1024"
    args = seeds.Args(env_ids=("Breakout-MinAtar",), seeds=(1, 2), flags=flags, vary=("learning-rate", "1e30", "1e-3"))
    args.output = tmp_path / "t.csv"
    seeds.main(args)
    bad, good = capsys.readouterr().out.splitlines()[-2:]
    label = "--total-timesteps 1024 --num-envs 8 --num-steps 64"
    assert bad.startswith(f"  {label} --learning-rate 1e+30") and bad.endswith(
        "seed 1 diverged after step 0; seed 2 diverged after step 0"
    )
    assert good.startswith(f"  {label}: ") and good.endswith(" (2 seeds)")
    monkeypatch.setattr(seeds, "train", None)
    seeds.main(args)  # nothing is trained again
    assert capsys.readouterr().out.splitlines()[-2:] == [bad, good]
    reading = read_runs([str(args.output)], "charts/episodic_return")
    assert [run.seed for run in reading.runs] == [1, 2] and len(reading.skipped) == 2
    same = make_args(ppo.Args, env_id="Breakout-MinAtar", num_envs=8, num_steps=64, total_timesteps=1024)
    assert {run.flags for run in reading.runs} == {
        typed_flags(ppo.__name__, to_store(same))
    }  # as a report calls a run's folder


def test_rows_of_a_table_are_means_of_episodes():
    returns, episodes, finite = np.array([2.0, np.nan, 5.0, 0.0]), np.array([3, 0, 1, 0]), np.ones(4, bool)
    assert seeds.rows_of(returns, episodes, finite, 100, 2) == [(200, 2.0, 3), (400, 5.0, 1)]
    assert seeds.rows_of(returns, episodes, finite, 100, 1) == [(400, 2.75, 4)]
    assert seeds.rows_of(returns[1:2], episodes[1:2], finite[:1], 100, 5) == [(100, None, 0)]
    assert seeds.rows_of(returns, episodes, finite & (np.arange(4) < 3), 100, 2) == [(200, 2.0, 3), (300, 5.0, 1)]
    assert seeds.rows_of(returns, episodes, ~finite, 100, 2) == [(0, None, 0)]


@pytest.mark.parametrize("updates", [7, 61, 122, 610])
def test_the_score_of_a_table_is_that_of_the_folder(updates):
    """Both have the same bins: their edges lie at the same steps, however many updates there are."""
    rng, step = np.random.default_rng(updates), 8192 * np.arange(1, updates + 1)
    returns, episodes = rng.normal(size=updates) + np.arange(updates), rng.integers(1, 9, updates)
    run = RunRecord("", "ppo", "Breakout-MinAtar", "", 1, int(step[-1]), step, returns, episodes.astype(float))
    for points in (20, 40):
        rows = seeds.rows_of(returns, episodes, np.ones(updates, bool), 8192, points)
        step, value, weight = map(np.array, zip(*rows, strict=True))
        of_table = run._replace(step=step, value=value, weight=weight)
        np.testing.assert_allclose(final_score(of_table, 40, 2), final_score(run, 40, 2), rtol=1e-12)
        np.testing.assert_allclose(last_tenth(of_table), last_tenth(run), rtol=1e-12)


def test_a_table_is_added_to(tmp_path, monkeypatch, capsys):
    """What it holds is not trained again, whatever else is asked for; its rows are kept."""
    trained = []

    def train(module, args, runs):
        trained.append([(args.env_id, run["seed"], run["ent_coef"]) for run in runs])
        seeds_of = np.array([[run["seed"] for run in runs]] * 6, float)
        return seeds.Returns(seeds_of, np.ones_like(seeds_of, int), np.ones_like(seeds_of, bool))

    monkeypatch.setattr(seeds, "train", train)
    args = seeds.Args(
        env_ids=("Breakout-MinAtar",), seeds=(3, 1), vary=("ent-coef", "0.1"), points=2, output=tmp_path / "t.csv"
    )
    seeds.main(args)
    assert args.output.read_text().splitlines()[1:3] == [
        "ppo,Breakout-MinAtar,--ent-coef 0.1,3,49152,24576,3.0000,3",
        "ppo,Breakout-MinAtar,--ent-coef 0.1,3,49152,49152,3.0000,3",
    ]
    seeds.main(replace(args, env_ids=("Breakout-MinAtar", "Asterix-MinAtar"), seeds=(1, 2, 3), vary=("ent-coef", "0.1", "0.2")))
    breakout, asterix = trained[1:]
    assert breakout == [("Breakout-MinAtar", *x) for x in ((2, 0.1), (1, 0.2), (2, 0.2), (3, 0.2))] and len(asterix) == 6
    assert len(args.output.read_text().splitlines()) == 1 + 2 * 12
    assert "--ent-coef 0.1: 2.00 +- 1.00 (3 seeds)" in capsys.readouterr().out
    seeds.main(args)
    assert len(trained) == 3


def test_two_processes_add_to_one_table(tmp_path, monkeypatch):
    """While this one trains, another adds a run of its own, and one that both train."""
    args = seeds.Args(env_ids=("Breakout-MinAtar",), seeds=(1, 2), points=1, output=tmp_path / "t.csv")
    trains = lambda value: lambda module, args, runs: seeds.Returns(*(np.full((6, len(runs)), x) for x in (value, 1, True)))  # noqa: E731

    def slowly(*given):
        monkeypatch.setattr(seeds, "train", trains(5.0))
        seeds.main(replace(args, seeds=(2, 3)))
        return trains(4.0)(*given)

    monkeypatch.setattr(seeds, "train", slowly)
    seeds.main(args)
    rows = [line.split(",") for line in args.output.read_text().splitlines()[1:]]
    assert [(row[3], row[6]) for row in rows] == [("2", "5.0000"), ("3", "5.0000"), ("1", "4.0000")]


def test_a_table_is_not_written_while_another_process_writes_it(tmp_path):
    table, holds = tmp_path / "t.csv", threading.Event()
    row = dict(zip(COLUMNS, ("ppo", "Breakout-MinAtar", "", "1", "100", "100", "2.5", "3"), strict=True))

    def other():
        with locked(table):
            holds.set()
            time.sleep(0.2)  # between reading and writing
            write_csv(table, COLUMNS, [row.values()])

    thread = threading.Thread(target=other)
    thread.start()
    holds.wait()
    seeds.add_to_table(table, [row | {"seed": "2"}])
    thread.join()
    assert [row["seed"] for row in seeds.read_table(table)] == ["1", "2"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"vary": ("ent-coef",)}, "--vary ent-coef: has no values"),
        ({"vary": ("max-grad-norm", "1")}, "--vary max-grad-norm: must be one of learning_rate, "),
        ({"vary": ("ent-coef", "x")}, "must be numbers"),
        ({"vary": ("learning-rate", "-1")}, "--learning-rate -1.0: must be positive"),
        ({"seeds": ()}, "--seeds: name at least one"),
        ({"seeds": (1, 2, 1)}, "has duplicates"),
        ({"seeds": (-1,)}, "--seed -1"),
        ({"points": 0}, "--points 0"),
        ({"flags": "--seed 3"}, "use --seeds"),
        ({"flags": "--track"}, "--track: is used only with the script itself"),
        ({"flags": "--save-every 0"}, "--save-every 0.0: is used only with the script itself"),
        ({"flags": "--track-grads"}, "--track-grads: is used only with the script itself"),
        ({"flags": "--env_id=Pong-v5"}, "use --env-ids"),
        ({"env_ids": ("Breakout-MinAtar", "Pong-v5")}, "--env-ids Pong-v5: is not written in JAX"),
        ({"env_ids": ("Brakout-MinAtar",)}, "did you mean Breakout-MinAtar"),
        ({"output": Path("/no/such/folder/x.csv")}, "does not exist"),
        ({"output": Path(__file__)}, "which has other columns; choose another name"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(flags, words, monkeypatch):
    monkeypatch.setattr(seeds, "train", None)
    with pytest.raises(UsageError) as error:
        seeds.main(seeds.Args(**flags))
    assert words in str(error.value)
