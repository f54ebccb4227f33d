"""Whole games, as many in each environment as were to be, and films of them."""

import csv
import errno
import json
import os
import resource
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import evaluate
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.atari import make_machado_pool
from envs.confounding_gridworld import ConfoundingGridworld
from envs.minatar import COLORS, MinAtar
from envs.protocol import Env, EpisodeStats, Timestep
from envs.registry import make_pool
from tests.commands import run
from utils.evaluation import video
from utils.evaluation.play import Film, Game, play, quotas
from utils.evaluation.video import check_path, write_video
from utils.runs import quiet_start
from utils.runs.flags import UsageError, make_args


class Turns(NamedTuple):
    """How many steps each environment has made, in the running game and in all."""

    game: Any
    over: Any
    number: Any
    episode: EpisodeStats


class Uneven(Env):
    """Games of environment i take 1 step and 40 (1 + i) in turn; a step pays what the action says; the 20th of a game is a lost
    life."""

    num_actions, reward_range = 3, (0.0, 2.0)
    obs_spec = jax.ShapeDtypeStruct((1,), jnp.float32)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self):
        zeros = jnp.zeros(self.num_envs, jnp.int32)
        return Turns(zeros, zeros > 0, zeros, EpisodeStats.zeros(self.num_envs)), jnp.zeros((self.num_envs, 1))

    def step(self, state, action):
        length = jnp.where(state.number % 2 == 0, 1, 40 * (1 + jnp.arange(self.num_envs)))
        valid = ~state.over
        game = jnp.where(valid, state.game + 1, 0)
        finished = game == length
        episode = state.episode.update(action.astype(jnp.float32), valid, finished)
        number = state.number + finished
        lost = finished | (game == 20)
        after = Timestep(game[:, None] * 1.0, action * 1.0, lost, jnp.zeros_like(lost), valid, episode)
        return Turns(jnp.where(finished, 0, game), finished, number, episode), after

    def exact_metrics(self, policy):
        return {}

    def render(self, state):
        return np.full((4, 6, 3), int(state.game[0]), np.uint8)


@given(st.integers(1, 300), st.integers(1, 40))
def test_quotas_are_even(episodes, num_envs):
    quota = quotas(episodes, num_envs)
    assert quota.sum() == episodes and np.ptp(quota) <= 1 and len(quota) == num_envs


def test_every_environment_plays_its_share_of_whole_games():
    """Of the first twelve games to end most would be short ones."""
    games = play(Uneven(3), lambda obs: jnp.array([0.0, 9.0, 0.0]) + 0 * obs, 12, jax.random.key(0), greedy=True)
    expected = [(i, length) for i in range(3) for length in (1, 40 * (1 + i)) * 2]
    assert [(game.env, game.episodic_length) for game in games] == expected
    assert [game.episodic_return for game in games] == [length for _, length in expected]  # the likely action pays 1
    assert not any(game.truncated for game in games)
    told = []
    drawn = play(Uneven(3), lambda obs: jnp.zeros((3, 3)) + 0 * obs, 7, jax.random.key(1), on_progress=told.append)
    assert [game.env for game in drawn] == [0, 0, 0, 1, 1, 2, 2] and told[-1] == 7
    assert [game.episodic_length for game in drawn] == [1, 40, 1, 1, 80, 1, 120]
    per_step = drawn[-1].episodic_return / 120  # of actions 0, 1, 2 alike
    assert 0.7 < per_step < 1.3 and any(game.episodic_return != game.episodic_length for game in drawn)


def test_a_film_has_a_picture_of_each_step(tmp_path):
    film = Film(Uneven(1), lambda params, obs: params + 0 * obs)
    logits = jnp.array([0.0, 99.0, 0.0])
    assert [frame[0, 0, 0] for frame in film.frames(logits, jax.random.key(0))] == [0, 0]  # the step that ends it starts anew
    assert film.game.episodic_length == 1
    film.env.reset = lambda: (Uneven(1).reset()[0]._replace(number=jnp.ones(1, jnp.int32)), jnp.zeros((1, 1)))
    for ending in ("mp4", "gif"):
        path = tmp_path / f"a.{ending}"
        assert write_video(path, film.frames(logits, jax.random.key(0))) == 41 == film.game.episodic_length + 1
    assert decode(tmp_path / "a.mp4") == ((6, 4), 41)
    assert len(list(film.frames(logits, jax.random.key(0), most=5))) == 5 and film.game is None
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (6, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


def decode(path):
    """Width and height, and the number of frames."""
    frames = imageio_ffmpeg.read_frames(str(path))
    size = tuple(next(frames)["size"])
    return size, sum(1 for _ in frames)


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_video_that_fails_leaves_what_was_there(ending, tmp_path):
    def broken():
        yield np.zeros((4, 6, 3), np.uint8)
        raise OSError("it was to fail")

    path = tmp_path / f"a.{ending}"
    path.write_text("of before")
    with pytest.raises(OSError, match="it was to fail"):
        write_video(path, broken())
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "of before"


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_video_that_does_not_fit_on_the_disk_leaves_what_was_there(ending, tmp_path):
    """ffmpeg gets all frames and fails afterward, when it writes the file."""
    frames, path = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), tmp_path / f"a.{ending}"
    path.write_text("of before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))  # bytes of a file
    try:
        with pytest.raises(OSError):
            write_video(path, frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "of before"


def test_names_of_videos(tmp_path, monkeypatch):
    assert check_path(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    for wrong in ("a.avi", "a", "no/a.gif"):
        with pytest.raises(UsageError):
            check_path(tmp_path / wrong)
    monkeypatch.setattr(video, "has_ffmpeg", lambda: False)
    assert check_path(tmp_path / "a.mp4") == tmp_path / "a.gif"


@pytest.mark.minatar
def test_pictures():
    env = ConfoundingGridworld(2, 0)
    picture = env.render(env.reset()[0])
    assert picture.shape == (420, 420, 3) and picture.dtype == np.uint8
    env = MinAtar("Breakout-MinAtar", 2, 0)
    state, obs = env.reset()
    picture = env.render(state)[::16, ::16]  # of the first game; paddle, ball, trail and bricks
    assert np.array_equal((picture == COLORS[0]).all(-1), ~np.asarray(obs[0], bool).any(-1))
    for row, column, kind in np.argwhere(np.asarray(obs[0])):
        assert np.array_equal(picture[row, column], COLORS[1 + kind]) or obs[0, row, column, kind + 1 :].any()
    pool = make_pool("Breakout-v5", 2, 1)
    assert pool.render(pool.reset()[0]).shape == (210, 160, 3)


def test_machado_et_al_know_no_lives():
    """Random play of Breakout, five lives: a game ends once, and no step but the one after it is no transition."""
    env = make_machado_pool("Breakout-v5", 4, 3)
    assert env.num_actions == 18 and make_pool("Breakout-v5", 1, 3, full_action_space=True).num_actions == 18
    state, _ = env.reset()
    actions = np.random.default_rng(0).integers(0, 18, (400, 4), np.int32)

    def step(state, action):
        state, after = env.step(state, action)
        return state, (after.terminated, after.episode.finished, after.valid)

    terminated, finished, valid = jax.device_get(jax.jit(lambda state: jax.lax.scan(step, state, actions)[1])(state))
    assert np.array_equal(terminated, finished) and terminated.any()
    assert valid[0].all() and np.array_equal(valid[1:], ~terminated[:-1])


def to_the_left(state, steps, advantages, key, agent, optimizer, args):
    """In the place of PPO's `update`: the first action nearly always, which pays half of what untrained networks get."""
    heads = state.params.actor_critic["params"]
    heads = {"params": heads | {"actor": heads["actor"] | {"bias": jnp.array([3.0, 0.0])}}}
    metrics = dict.fromkeys(("losses/policy_loss", "charts/learning_rate"), jnp.ones(()))
    return state._replace(params=state.params._replace(actor_critic=heads), iteration=state.iteration + 1), metrics


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A short run."""
    logdir = tmp_path_factory.mktemp("runs")
    small = {"num_envs": 16, "num_steps": 32, "fc_layers": (8,), "total_timesteps": 16 * 32 * 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", to_the_left)
        ppo.main(make_args(ppo.Args, env_id="CartPole-v1", logdir=str(logdir), run_name="c", **small))
    return logdir / "c"


def test_a_run_gets_the_return_that_it_ended_with(cartpole, tmp_path, capsys):
    args = evaluate.Args(run=cartpole, episodes=300, output=tmp_path / "t.csv", video=tmp_path / "v.mp4")
    evaluate.main(args)
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(rows) == 300 and {row["env"] for row in rows} == {str(i) for i in range(128)}
    assert {(row["run"], row["run_seed"], row["step"], row["protocol"]) for row in rows} == {("c", "1", "3072", "train")}
    logged = [json.loads(line) for line in (cartpole / "metrics.jsonl").read_text().splitlines()][-1]
    returns = np.array([float(row["episodic_return"]) for row in rows])
    lengths = np.array([int(row["episodic_length"]) for row in rows])
    assert returns.mean() < 14
    for found, ended in ((returns, logged["charts/episodic_return"]), (lengths, logged["charts/episodic_length"])):
        error = found.std() * np.sqrt(1 / 300 + 1 / logged["charts/episodes"])
        assert abs(found.mean() - ended) < 4 * error + 1e-9
    assert f"return: mean {returns.mean():.2f}, 95% interval" in said and f"median {np.median(returns):.2f}" in said
    size, frames = decode(tmp_path / "v.mp4")
    assert size == (600, 400) and f"{frames:,} frames" in said
    evaluate.main(replace(args, video=None))  # the same seed plays the same games
    assert list(csv.DictReader((tmp_path / "t.csv").open())) == rows


def test_mistakes_of_an_evaluation(cartpole, tmp_path):
    for flags, said in (
        ({"episodes": 0}, "--episodes 0"),
        ({"num_envs": 200}, "--num-envs 200: must be 1 to --episodes 100"),
        ({"protocol": "machado"}, "was trained on CartPole-v1, not Atari; leave it out"),
        ({"output": tmp_path / "no" / "t.csv"}, "--output .*t.csv: folder .*no does not exist"),
        ({"output": Path("/proc/t.csv")}, "--output /proc/t.csv: cannot be written .*; name another file with --output"),
        ({"output": Path("/dev/null")}, "--output /dev/null: is not a regular file"),
        ({"output": cartpole / "metrics.jsonl"}, "metrics.jsonl: exists, and is not a table of games"),
        ({"output": Path("~nobody-at-all/t.csv")}, "--output ~nobody-at-all/t.csv: ~nobody-at-all is no home folder"),
        ({"run": Path("~nobody-at-all/r")}, "~nobody-at-all is no home folder"),
        ({"video": Path("/proc/v.gif")}, "--video /proc/v.gif: cannot be written"),
        ({"video": Path("~nobody-at-all/v.gif")}, "--video ~nobody-at-all/v.gif: ~nobody-at-all is no home folder"),
        ({"video": tmp_path / "v.gif", "output": tmp_path / "v.gif"}, "--output .*v.gif: is also the --video; rename one"),
        ({"video": tmp_path / "v.webm"}, "use .mp4 or .gif"),
        ({"run": tmp_path}, "neither a model nor a checkpoint"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate.main(replace(evaluate.Args(run=cartpole), **flags))


@pytest.fixture
def played(cartpole, tmp_path, monkeypatch):
    """Evaluate a copy of the run; the games are those of a list, which is returned with the folder."""
    folder, returns = tmp_path / "r", []
    shutil.copytree(cartpole, folder)
    monkeypatch.setattr(evaluate, "play", lambda *_: [Game(i, x, 10, False) for i, x in enumerate(returns)])
    return folder, returns


def test_no_older_table_is_lost(played, capsys):
    """evaluate.py RUN --episodes 20, then --episodes 1."""
    folder, returns = played
    names = lambda: sorted(path.name for path in folder.glob("evaluation*"))  # noqa: E731
    args, rows = evaluate.Args(run=folder), lambda name: len((folder / name).read_text().splitlines()) - 1
    returns += [float(x) for x in range(20)]
    evaluate.main(replace(args, episodes=20))
    assert "95% interval [" in capsys.readouterr().out and names() == ["evaluation.csv"]
    returns[:] = [53.0]
    evaluate.main(replace(args, episodes=1))
    said = capsys.readouterr().out
    assert "return: mean 53.00, 95% interval unknown (one game)\n" in said and f"table: {folder}/evaluation_2.csv\n" in said
    evaluate.main(replace(args, episodes=1))  # the same games again are the same table
    assert names() == ["evaluation.csv", "evaluation_2.csv"]
    assert (rows("evaluation.csv"), rows("evaluation_2.csv")) == (20, 1)
    returns[:] = [54.0]
    evaluate.main(replace(args, episodes=1))
    assert names() == ["evaluation.csv", "evaluation_2.csv", "evaluation_3.csv"]
    own = folder / "evaluation.csv"
    capsys.readouterr()
    evaluate.main(replace(args, episodes=1, output=own))
    assert f"table: {own} (replaces a table of 20 games)" in capsys.readouterr().out and rows("evaluation.csv") == 1


def test_home_is_expanded(played, tmp_path, monkeypatch):
    folder, returns = played
    returns.append(1.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    evaluate.main(evaluate.Args(run=Path("~/r"), episodes=1, output=Path("~/t.csv")))
    assert (tmp_path / "t.csv").exists() and check_path(Path("~/a.gif")) == tmp_path / "a.gif"


def test_a_folder_that_cannot_be_written_is_known_before_the_games(cartpole, monkeypatch):
    """The folder of a colleague's run."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setattr(evaluate, "play", lambda *_: pytest.fail("games were played"))
    with pytest.raises(UsageError, match="--output .*evaluation.csv: cannot be written .Permission denied.; name another file"):
        evaluate.main(evaluate.Args(run=cartpole))
    with pytest.raises(UsageError, match="--video .*v.gif: cannot be written"):
        evaluate.main(evaluate.Args(run=cartpole, video=cartpole / "v.gif"))


def test_scores_are_printed_before_the_table_is_written(played, monkeypatch, capsys):
    """The disk fills up during the games."""
    folder, returns = played
    returns += [1.0, 3.0]

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate, "write_whole", refuse)
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.Args(run=folder))
    said = capsys.readouterr()
    assert end.value.code == 1 and "return: mean 2.00" in said.out
    assert said.err.startswith(f"error: --output {folder}/evaluation.csv: could not be written (No space left")


def test_an_older_video_is_mentioned(played, capsys):
    folder, returns = played
    returns.append(1.0)
    (folder / "v.gif").write_text("of before")
    evaluate.main(evaluate.Args(run=folder, episodes=1, video=folder / "v.gif"))
    assert capsys.readouterr().out.endswith(" (replaces an older video)\n")


def test_where_the_table_goes(cartpole):
    loaded = evaluate.read_run(cartpole)
    where = lambda path, **flags: evaluate.default_output(evaluate.Args(run=path, **flags), loaded)  # noqa: E731
    assert where(cartpole) == where(cartpole / "model") == cartpole / "evaluation.csv"
    assert where(cartpole, protocol="machado", greedy=True) == cartpole / "evaluation_machado_greedy.csv"
    assert where(cartpole / "checkpoints" / "000000003072") == cartpole / "evaluation_3072.csv"


def test_the_command_line(cartpole, tmp_path, monkeypatch, capsys):
    """A process of its own; a mistake ends one as it ends this script here."""
    done = run("evaluate.py", str(cartpole), "--episodes=5", "--greedy", f"--video={tmp_path / 'v.gif'}")
    assert (done.returncode, done.stderr) == (0, "") and "5 games under the train protocol, most likely actions" in done.stdout
    assert (cartpole / "evaluation_greedy.csv").exists() and (tmp_path / "v.gif").exists()
    monkeypatch.setattr(quiet_start, "start_quietly", lambda: None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(evaluate.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.slow
def test_machado_on_atari_from_the_command_line(tmp_path):
    small = ["--num-envs=8", "--num-steps=4", "--total-timesteps=96", "--fc-layers=32", f"--logdir={tmp_path}"]
    for name, flags in (("minimal", []), ("full", ["--full-action-space"])):
        done = run("ppo_atari_envpool_xla_jax_scan.py", *small, f"--run-name={name}", *flags)
        assert done.returncode == 0, done.stderr
    refused = run("evaluate.py", str(tmp_path / "minimal"), "--protocol=machado")
    assert refused.returncode == 2 and "trained on the 4 of Breakout-v5; train it with --full-action-space" in refused.stderr
    words = ["--protocol=machado", "--episodes=3", f"--video={tmp_path / 'v.mp4'}"]
    done = run("evaluate.py", str(tmp_path / "full"), *words)
    assert done.returncode == 0 and "human-normalized score" in done.stdout, done.stderr
    size, frames = decode(tmp_path / "v.mp4")
    assert size == (160, 210) and f"{frames:,} frames" in done.stdout
