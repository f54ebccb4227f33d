"""Write videos: MP4 with the optional imageio-ffmpeg, or GIF with Pillow."""

import errno
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from utils.files import INCOMPLETE
from utils.runs.flags import UsageError
from utils.runs.outputs import check_output, expand

FRAMES_PER_SECOND = 15  # real time on Atari: 60 frames per second, of which an agent sees every fourth
ENDINGS = (".mp4", ".gif")


def has_ffmpeg() -> bool:
    """Return True if MP4 can be written."""
    try:
        import imageio_ffmpeg

        return bool(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # the package may be installed without the program
        return False


def check_path(path: Path) -> Path:
    """Return the path of --video with `~` expanded, and with .gif instead of .mp4 if imageio-ffmpeg is not available.

    Raises:
        UsageError: the ending is neither, or the file cannot be written.
    """
    path = expand(path, "--video")
    if path.suffix not in ENDINGS:
        raise UsageError(f"--video {path}: unknown video format; use {' or '.join(ENDINGS)}")
    return check_output(path if has_ffmpeg() else path.with_suffix(".gif"), "--video")


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> int:
    """Write the frames and return their number. On an error, leave an existing file unchanged.

    Raises:
        OSError: the video cannot be written.
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
    # macro_block_size=2 enlarges frames only to even sizes, not to multiples of 16
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2, quality=8)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # JAX warns of the fork, which only runs ffmpeg
        writer.send(None)
    count = 0
    try:
        for frame in itertools.chain([first], frames):
            writer.send(np.ascontiguousarray(frame))
            count += 1
    finally:
        writer.close()
    try:  # write_frames does not say if ffmpeg failed at the end, for example on a full disk
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        written = 0
    if written < count:
        raise OSError(errno.EIO, f"ffmpeg wrote {written} of {count} frames; is the disk full?", str(path))
    return count


def _write_gif(path: Path, frames: Iterable[np.ndarray]) -> int:
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
    return len(images)
