"""Videos: MP4 by imageio-ffmpeg, an extra, or GIFs by pillow."""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from utils.runs.checkpoints import INCOMPLETE
from utils.runs.flags import UsageError

FRAMES_PER_SECOND = 15  # as fast as a person plays Atari, of whose frames an agent sees every fourth
ENDINGS = (".mp4", ".gif")


def has_ffmpeg() -> bool:
    """Whether MP4 can be written."""
    try:
        import imageio_ffmpeg

        return bool(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # the package may be there without the program
        return False


def check_path(path: Path) -> Path:
    """The path with the ending that can be written: without imageio-ffmpeg .gif in the place of .mp4.

    Raises:
        UsageError: it is neither, or its folder is not there.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: a video ends in {' or '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    return path if has_ffmpeg() else path.with_suffix(".gif")


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> int:
    """Writes the frames, or after a fault nothing. Returns how many there were.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.stem}{INCOMPLETE}{path.suffix}")
    try:
        count = _write_gif(partial, frames) if path.suffix == ".gif" else _write_mp4(partial, iter(frames))
        partial.replace(path)
        return count
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: Iterator[np.ndarray]) -> int:
    import imageio_ffmpeg

    first = next(frames)
    height, width = first.shape[:2]
    # a frame is not enlarged to whole blocks of 16, only to even numbers
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2, quality=8)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # JAX's of a fork, which becomes ffmpeg at once
        writer.send(None)
    count = 0
    try:
        for frame in itertools.chain([first], frames):
            writer.send(np.ascontiguousarray(frame))
            count += 1
    finally:
        writer.close()
    return count


def _write_gif(path: Path, frames: Iterable[np.ndarray]) -> int:
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
    return len(images)
