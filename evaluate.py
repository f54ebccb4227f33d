"""Plays whole games with what a run has trained, says how well it does, and films it.

    python evaluate.py runs/my-run --episodes 100 --video game.mp4

Each environment plays a number of games that is fixed beforehand, over all lives. Actions are drawn, as in training, or with
--greedy the most likely ones. A row of each game goes into a table.
"""

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from envs.atari import make_machado_pool
from envs.protocol import Env
from envs.registry import atari_protocol, family, make_env
from utils.evaluation.camera import MOST_FRAMES
from utils.evaluation.play import Film, Game, play, policy_of
from utils.evaluation.video import check_path, write_video
from utils.runs.checkpoints import write_csv
from utils.runs.compilation_cache import keep_compiled
from utils.runs.flags import UsageError, require
from utils.runs.folder import CHECKPOINTS, MODEL
from utils.runs.launch import describe_device, run_main
from utils.runs.load_run import LoadedRun, read_run
from utils.runs.scores import reference
from utils.statistics import CONFIDENCE, mean, with_interval

COLUMNS = ("run", "script", "env_id", "run_seed", "step", "protocol", "greedy", "seed", "game", "env")
COLUMNS += ("episodic_return", "episodic_length", "truncated")
SAID_SECONDS = 10.0  # between two lines that say how many games were played


@dataclass
class Args:
    """Flags of the evaluation."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run: its final model, or its last checkpoint; or of one checkpoint"""
    episodes: int = 100
    """games to play"""
    num_envs: int | None = None
    """environments that play at once, each the same number of games or one more; if not given one for each game, up to 128"""
    protocol: Literal["train", "machado"] = "train"
    """train: the environments of the run; machado: Atari with sticky actions (0.25), all 18 actions and no knowledge of lives
    (Machado et al., 2018), for runs with --full-action-space and those of games that use all 18"""
    greedy: bool = False
    """take the most likely action instead of drawing one"""
    seed: int = 1
    """of environments and actions; those of training are others whatever it is"""
    output: Path | None = None
    """the table; if not given evaluation.csv in the run's folder, or evaluation_machado.csv, evaluation_greedy.csv and so on"""
    video: Path | None = None
    """film another game: .mp4 (needs imageio-ffmpeg: uv run --extra video ...), or .gif"""


def make_envs(args: Args, run: LoadedRun, num_envs: int, seed: int) -> Env:
    """Environments to play in.

    Raises:
        UsageError: the run cannot be played by that protocol.
    """
    env_id = run.args.env_id
    if args.protocol == "train":
        return make_env(replace(run.args, num_envs=num_envs, seed=seed))
    require(family(env_id) == "atari", f"--protocol machado: is one of Atari's games, and {args.run} was trained on {env_id}")
    env = make_machado_pool(env_id, num_envs, seed, run.args.env_step)
    if env.num_actions != run.env.num_actions:
        raise UsageError(
            f"--protocol machado: plays with all {env.num_actions} actions, and {args.run} was trained on the "
            f"{run.env.num_actions} of {env_id}: train it with --full-action-space, or leave out --protocol"
        )
    return env


def describe(games: list[Game], run: LoadedRun, protocol: str) -> list[str]:
    """Lines that say how well it does."""
    returns = np.array([game.episodic_return for game in games])
    low, high = with_interval([returns], mean, np.random.default_rng(0))[1]
    spread = f"{returns.std(ddof=1):.2f}" if len(returns) > 1 else "unknown"
    lines = [
        f"return: mean {returns.mean():.2f}, {CONFIDENCE:.0%} interval [{low:.2f}, {high:.2f}] (bootstrap)",
        f"        median {np.median(returns):.2f}, standard deviation {spread}, {returns.min():g} to {returns.max():g}",
        f"length: mean {np.mean([g.episodic_length for g in games]):,.0f} steps; {sum(g.truncated for g in games)} cut off",
    ]
    known = reference(run.args.env_id, atari_protocol(run.args))
    if known is not None:
        lines.append(f"human-normalized score: {known.human_normalized(returns.mean()):.3f} (0 random play, 1 human)")
        if known.baseline is not None and protocol == "train":
            lines.append(f"published PPO: {known.baseline:,.1f}")
    return lines


def table(games: list[Game], run: LoadedRun, args: Args) -> list[tuple]:
    """A row for each game."""
    rows = []
    of_run = (run.progress["name"], run.progress["script"], run.args.env_id, run.progress["seed"], run.progress["step"])
    for i, game in enumerate(games):
        played = (game.env, f"{game.episodic_return:g}", game.episodic_length, int(game.truncated))
        rows.append((*of_run, args.protocol, int(args.greedy), args.seed, i, *played))
    return rows


def default_output(args: Args, run: LoadedRun) -> Path:
    """Where the table goes if nobody says so: beside what is evaluated, which stays as it is."""
    kind = [args.protocol] * (args.protocol != "train") + ["greedy"] * args.greedy
    folder, path = args.run, args.run.absolute()
    if path.parent.name == CHECKPOINTS:
        folder, kind = path.parents[1], [f"{run.progress['step']}", *kind]
    elif path.name == MODEL:
        folder = path.parent
    return folder / f"{'_'.join(['evaluation', *kind])}.csv"


def open_camera(args: Args, run: LoadedRun, seed: int) -> Film:
    """A camera before a game of its own.

    Raises:
        UsageError: the environment has no pictures.
    """
    env = make_envs(args, run, 1, seed)
    try:
        env.render(env.reset()[0])
    except (AttributeError, RuntimeError) as error:
        raise UsageError(f"--video: {run.args.env_id} cannot be filmed ({error}); leave it out") from None
    return Film(env, lambda params, obs: policy_of(params, run.agent)(obs), args.greedy)


def main(args: Args) -> None:
    """Plays, and writes."""
    args = replace(args, run=args.run.expanduser())
    require(args.episodes >= 1, f"--episodes {args.episodes}: must be at least 1")
    num_envs = min(args.episodes, 128) if args.num_envs is None else args.num_envs
    require(1 <= num_envs <= args.episodes, f"--num-envs {num_envs}: must be 1 to --episodes {args.episodes}")
    require(0 <= args.seed < 2**31, f"--seed {args.seed}: must be 0 or more, and less than 2**31")
    video = None if args.video is None else check_path(args.video)
    if video != args.video:
        print(f"*** there is no imageio-ffmpeg: the video becomes {video} (uv run --extra video ... for MP4) ***")
    # a run's own seed is one number, so that no training has the same
    seeds = [int(seed) for seed in np.random.SeedSequence([args.seed, len(COLUMNS)]).generate_state(3)]
    run = read_run(args.run, num_envs=1)
    env = make_envs(args, run, num_envs, seeds[0])
    camera = None if video is None else open_camera(args, run, seeds[2])
    output = args.output or default_output(args, run)
    require(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}; make it first")
    print(f"{run.progress['name']}: {run.progress['script']} on {run.args.env_id} after {run.progress['step']:,} steps")
    keep_compiled()
    print(describe_device(), flush=True)

    said = time.monotonic()

    def say(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > SAID_SECONDS:
            said = time.monotonic()
            print(f"{done} of {args.episodes} games", flush=True)

    keys = jax.random.split(jax.random.key(seeds[1]))
    games = play(env, policy_of(run.params, run.agent), args.episodes, keys[0], args.greedy, say)
    write_csv(output, COLUMNS, table(games, run, args))
    how = "most likely actions" if args.greedy else "drawn actions"
    print(f"{len(games)} games by the {args.protocol} protocol, {how}, seed {args.seed}:")
    print("\n".join([*describe(games, run, args.protocol), f"table: {output}"]), flush=True)
    if camera is not None:
        most = MOST_FRAMES if video.suffix == ".gif" else None  # all pictures of a GIF are in memory together
        with contextlib.closing(camera.frames(run.params, keys[1], most)) as frames:
            count = write_video(video, frames)
        ended = f"return {camera.game.episodic_return:g}" if camera.game else "cut off there"
        print(f"video: {video}, {count:,} frames, {ended}")


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args)))
