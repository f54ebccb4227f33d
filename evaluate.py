"""Play whole games with a trained policy, report its returns, and record a video.

    python evaluate.py runs/my-run --episodes 100 --video game.mp4

Each environment plays a fixed number of games; a game includes all lives. Actions are sampled, as in training; with --greedy
they are the most likely ones. The results are written to a table with one row per game.
"""

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import contextlib
import csv
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from envs.atari import make_machado_pool
from envs.atari_scores import reference
from envs.protocol import Env
from envs.registry import atari_protocol, family, make_env, refusal
from utils.evaluation.camera import MOST_FRAMES
from utils.evaluation.play import Film, Game, play, policy_of
from utils.evaluation.video import check_path, write_video
from utils.files import csv_text, write_whole
from utils.runs.compilation_cache import keep_compiled
from utils.runs.flags import UsageError, parse_command, require
from utils.runs.folder import CHECKPOINTS, MODEL, copied_from, read_record
from utils.runs.launch import describe_device, fail, run_main, start_jax
from utils.runs.load_run import LoadedRun, read_run
from utils.runs.outputs import check_output, expand
from utils.runs.stored_flags import slug
from utils.runs.wandb_run import add_to_summary
from utils.statistics import CONFIDENCE, mean, with_interval

COLUMNS = ("run", "script", "env_id", "run_seed", "step", "protocol", "greedy", "seed", "game", "env")
COLUMNS += ("episodic_return", "episodic_length", "truncated")
OPTION = "env_option"  # a column that only tables with --env-option have
SAID_SECONDS = 10.0  # between two progress messages


@dataclass
class Args:
    """Play games with a trained policy."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run (its model or last checkpoint, whichever is later), or of one checkpoint"""
    episodes: int = 100
    """number of games to play"""
    num_envs: int | None = None
    """number of parallel environments, which share the games evenly (default: one per game, up to 128)"""
    protocol: Literal["train", "machado"] = "train"
    """train: the environments of the run. machado: Atari with sticky actions (0.25), all 18 actions and no loss-of-life signal
    (Machado et al., 2018), for runs with --full-action-space or on games that use all 18 actions"""
    env_option: tuple[str, ...] = ()
    """options of the environment that differ from the run's, such as num_levels=0 start_level=1000000: levels of Procgen that
    training has not seen"""
    greedy: bool = False
    """take the most likely action instead of sampling one"""
    seed: int = 1
    """seed of environments and actions; no seed gives the random numbers of training"""
    output: Path | None = None
    """file of the table (default: evaluation.csv in the run's folder, or evaluation_machado.csv, evaluation_greedy.csv, ...; a
    number is added if the file exists and holds other games)"""
    track: bool = False
    """also put the results into the summary of the run's W&B run, as evaluation/return_mean and others"""
    video: Path | None = None
    """file of a video of one more game: .mp4 (needs imageio-ffmpeg: uv run --extra video ...) or .gif"""


def make_envs(args: Args, run: LoadedRun, num_envs: int, seed: int) -> Env:
    """Return the environments to play in.

    Raises:
        UsageError: the protocol does not fit the run's game or actions, or --env-option is wrong or changes observations.
    """
    env_id = run.args.env_id
    typed = f"--env-option {' '.join(args.env_option)}"
    if args.protocol == "train":
        named = {word.partition("=")[0] for word in args.env_option}
        options = *(word for word in run.args.env_option if word.partition("=")[0] not in named), *args.env_option
        said = refusal(env_id, options)
        require(said is None, said or "")
        env = make_env(replace(run.args, num_envs=num_envs, seed=seed, env_option=options))
        now, before = ((e.obs_spec.shape, e.obs_spec.dtype, e.num_actions) for e in (env, run.env))
        require(now == before, f"{typed}: changes what {args.run} observes, or its actions")
        return env
    require(not args.env_option, f"{typed}: needs --protocol train")
    require(family(env_id) == "atari", f"--protocol machado: {args.run} was trained on {env_id}, not Atari; leave it out")
    env = make_machado_pool(env_id, num_envs, seed, run.args.env_step)
    if env.num_actions != run.env.num_actions:
        raise UsageError(
            f"--protocol machado: uses all {env.num_actions} actions, but {args.run} was trained on the "
            f"{run.env.num_actions} of {env_id}; train it with --full-action-space, or leave out --protocol"
        )
    return env


def describe(games: list[Game], run: LoadedRun, protocol: str) -> list[str]:
    """Return lines that summarize the games."""
    returns = np.array([game.episodic_return for game in games])
    interval, spread = "unknown (one game)", "unknown"
    if len(returns) > 1:
        low, high = interval_of(returns)
        interval, spread = f"[{low:.2f}, {high:.2f}] (bootstrap)", f"{returns.std(ddof=1):.2f}"
    lines = [
        f"return: mean {returns.mean():.2f}, {CONFIDENCE:.0%} interval {interval}",
        f"        median {np.median(returns):.2f}, standard deviation {spread}, {returns.min():g} to {returns.max():g}",
        f"length: mean {np.mean([g.episodic_length for g in games]):,.0f} steps; {sum(g.truncated for g in games)} truncated",
    ]
    known = reference(run.args.env_id, atari_protocol(run.args))
    if known is not None:
        lines.append(f"human-normalized score: {known.human_normalized(returns.mean()):.3f} (0 random play, 1 human)")
        if known.baseline is not None and protocol == "train":
            lines.append(f"published PPO: {known.baseline:,.1f}")
    return lines


def table(games: list[Game], run: LoadedRun, args: Args) -> bytes:
    """Return a CSV table with one row per game and the columns of `COLUMNS`."""
    rows = []
    of_run = (run.progress["name"], run.progress["script"], run.args.env_id, run.progress["seed"], run.progress["step"])
    for i, game in enumerate(games):
        played = (game.env, f"{game.episodic_return:g}", game.episodic_length, int(game.truncated))
        rows.append((*of_run, args.protocol, int(args.greedy), args.seed, i, *played))
    if args.env_option:
        return csv_text((*COLUMNS, OPTION), [(*row, " ".join(args.env_option)) for row in rows]).encode(errors="replace")
    return csv_text(COLUMNS, rows).encode(errors="replace")


def games_in(path: Path) -> int | None:
    """Return the number of games in an older table; None if there is no file.

    Raises:
        UsageError: the file is not a table of games.
    """
    if not path.exists():
        return None
    try:
        head, *rows = csv.reader(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, ValueError, csv.Error):
        head, rows = [], []
    require(set(COLUMNS) <= set(head), f"--output {path}: exists, and is not a table of games; choose another name")
    return len(rows)


def write_table(path: Path, content: bytes, numbered: bool) -> Path:
    """Write the table and return its path. If `numbered`, a number is added to a name that another table has."""
    chosen, number = path, 1
    while numbered and os.path.lexists(chosen):
        with contextlib.suppress(OSError):
            if chosen.read_bytes() == content:
                return chosen
        number += 1
        chosen = path.with_stem(f"{path.stem}_{number}")
    write_whole(chosen, content)
    return chosen


def default_output(args: Args, run: LoadedRun) -> Path:
    """Return the default path of the table, which is in the run's folder but never inside a model or checkpoint."""
    kind = [args.protocol] * (args.protocol != "train") + ["greedy"] * args.greedy
    kind += [slug(list(args.env_option))] * bool(args.env_option)
    if args.run.absolute().parent.name == CHECKPOINTS:
        kind = [f"{run.progress['step']}", *kind]
    return run_folder(args.run) / f"{'_'.join(['evaluation', *kind])}.csv"


def run_folder(path: Path) -> Path:
    """Return the run's folder, given that folder or one of its model or checkpoints."""
    path = path.absolute()
    return path.parents[1] if path.parent.name == CHECKPOINTS else path.parent if path.name == MODEL else path


def wandb_identity(args: Args) -> dict[str, Any]:
    """Return what identifies the run in W&B.

    Raises:
        UsageError: the run was not tracked, or it is a copy of another run, whose results would be replaced.
    """
    identity = (read_record(run_folder(args.run)) or {}).get("wandb")
    original = identity and copied_from(identity, run_folder(args.run))
    require(not original, f"--track: {args.run} is a copy of {original}, to which the W&B run belongs; evaluate that")
    require(bool(identity), f"--track: {args.run} has no W&B run, because it was trained without --track; leave it out")
    return identity


def results(games: list[Game], run: LoadedRun) -> dict[str, float]:
    """Return the results that W&B shows: mean return with its interval, number of games, and steps of training."""
    returns = np.array([game.episodic_return for game in games])
    found = {"return_mean": float(returns.mean()), "episodes": len(games), "step": run.progress["step"]}
    if len(returns) > 1:
        found["return_low"], found["return_high"] = map(float, interval_of(returns))
    return found


def interval_of(returns: np.ndarray) -> tuple[float, float]:
    """Return the ends of the bootstrap interval of the mean."""
    return with_interval([returns], mean, np.random.default_rng(0))[1]


def open_camera(args: Args, run: LoadedRun, seed: int) -> Film:
    """Return a camera that films one game in its own environment.

    Raises:
        UsageError: the environment cannot be rendered.
    """
    env = make_envs(args, run, 1, seed)
    try:
        env.render(env.reset()[0])
    except (AttributeError, RuntimeError) as error:
        raise UsageError(f"--video: {run.args.env_id} cannot be rendered ({error}); leave out --video") from None
    return Film(env, lambda params, obs: policy_of(params, run.agent)(obs), args.greedy)


def main(args: Args) -> None:
    """Play the games, and write the table and the video."""
    args = replace(args, run=expand(args.run))
    require(args.episodes >= 1, f"--episodes {args.episodes}: must be at least 1")
    num_envs = min(args.episodes, 128) if args.num_envs is None else args.num_envs
    require(1 <= num_envs <= args.episodes, f"--num-envs {num_envs}: must be 1 to --episodes {args.episodes}")
    require(0 <= args.seed < 2**31, f"--seed {args.seed}: must be 0 or more, and less than 2**31")
    video = None if args.video is None else check_path(args.video)
    if video is not None and video.suffix != args.video.suffix:
        print(f"*** imageio-ffmpeg is not installed: writing {video} instead (for MP4: uv run --extra video ...) ***")
    # training derives its seeds from one number, so seeds derived from two are different
    seeds = [int(seed) for seed in np.random.SeedSequence([args.seed, len(COLUMNS)]).generate_state(3)]
    start_jax()
    run = read_run(args.run, num_envs=1)
    identity = wandb_identity(args) if args.track else None
    env = make_envs(args, run, num_envs, seeds[0])
    camera = None if video is None else open_camera(args, run, seeds[2])
    output = check_output(args.output or default_output(args, run), "--output")
    require(video is None or video.resolve() != output.resolve(), f"--output {output}: is also the --video; rename one")
    older = None if args.output is None else games_in(output)
    films = video is not None and video.exists()
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
    how = "most likely actions" if args.greedy else "sampled actions"
    options = "".join(f", {word}" for word in args.env_option)
    print(f"{len(games)} games under the {args.protocol} protocol{options}, {how}, seed {args.seed}:")
    print("\n".join(describe(games, run, args.protocol)), flush=True)
    try:
        output = write_table(output, table(games, run, args), args.output is None)
    except OSError as error:  # since the check, the disk has filled up
        fail(f"--output {output}: could not be written ({error.strerror}); the scores above are complete", 1)
    replaced = "" if older is None else f" (replaces a table of {older} game{'s' * (older != 1)})"
    print(f"table: {output}{replaced}", flush=True)
    if identity is not None:
        kind = default_output(args, run).stem
        add_to_summary(identity, {f"{kind}/{name}": value for name, value in results(games, run).items()})
        print(f"W&B: {kind}/... in the summary of run {identity['id']}", flush=True)
    if camera is not None:
        most = MOST_FRAMES if video.suffix == ".gif" else None  # a GIF's frames are all in memory at once
        with contextlib.closing(camera.frames(run.params, keys[1], most)) as frames:
            try:
                count = write_video(video, frames)
            except OSError as error:
                fail(f"--video {video}: could not be written ({error.strerror or error})", 1)
        ended = f"return {camera.game.episodic_return:g}" if camera.game else "cut off at the frame limit"
        print(f"video: {video}, {count:,} frames, {ended}{' (replaces an older video)' if films else ''}")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: lower --num-envs")
