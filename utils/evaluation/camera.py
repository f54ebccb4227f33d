"""Videos of a policy during training."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from envs.registry import UNDIVIDED, make_env
from utils.evaluation.play import Film, policy_of
from utils.evaluation.video import has_ffmpeg, write_video

MOST_FRAMES = 3_000  # per video: 200 seconds
VIDEOS = "videos"


class Camera:
    """Films a game every `--video-every` steps. It has its own environment and random keys, so training is unaffected.

    Args:
        args: flags of a run.
        agent: the networks of its script.
        folder: the run's folder.
    """

    def __init__(self, args: Any, agent: Any, folder: Path):
        self.args, self.agent, self.folder = args, agent, folder / VIDEOS
        self.film = None

    def is_due(self, step: int, steps_per_iteration: int, last: bool) -> bool:
        """Return True if a game should be filmed after the update that ended at `step`."""
        return last or step // self.args.video_every > (step - steps_per_iteration) // self.args.video_every

    def take(self, params: Any, step: int) -> tuple[Path, float | None]:
        """Film a game of the policy with these parameters. Return the file and the return of the game, which is None if the
        game was longer than the video.

        Raises:
            OSError: the video cannot be written.
        """
        seed = int(np.random.SeedSequence([self.args.seed, step]).generate_state(1)[0])
        if self.film is None:  # created once, to compile once
            env = make_env(dataclasses.replace(self.args, num_envs=1, seed=seed, **UNDIVIDED))
            self.film = Film(env, lambda params, obs: policy_of(params, self.agent)(obs))
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{step:012d}.{'mp4' if has_ffmpeg() else 'gif'}"
        with contextlib.closing(self.film.frames(params, jax.random.key(seed), MOST_FRAMES)) as frames:
            write_video(path, frames)
        return path, self.film.game and self.film.game.episodic_return
