"""What the numbers of an observation are, and dictionaries of arrays as one array.

Shape and dtype of an array say enough about frames, maps and vectors. Integers that name things, text, and the arrays of a
dictionary need more: one `Part` each. Several parts, or one that is not an array of numbers, are stored flat, one after the
other, in one array (`pack`). The encoder takes it apart again (`unpack`).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, Shaped

SMALLEST_FRAME = 32  # pixels along each axis; a smaller image is a grid of cells
MOST_SYMBOLS = 512  # values that are one-hot encoded, per number
LARGEST_CODE = 2**16  # elements of the one-hot code of a part
LARGEST_COUNT = 2**24  # values of a count, which a float holds exactly


class Part(NamedTuple):
    """A part of an observation.

    Attributes:
        name: in messages.
        shape: of the array, channels last.
        kind: `pixels`: bytes of an image. `numbers`: a vector or map of numbers. `symbols`: integers that name things, which
            the encoder turns into one-hot codes. `counts`: integers with more values, which it scales to [0, 1]. `text`: bytes,
            padded with zeros.
        values: symbols: how many there are, for each channel (element of the last axis). counts: how many.
        lowest: symbols and counts: the smallest integer.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["pixels", "numbers", "symbols", "counts", "text"]
    values: tuple[int, ...] = ()
    lowest: int = 0


class Unreadable(Exception):
    """No encoder reads this observation. The message says why."""


def part_of(name: str, shape: Sequence[int], dtype: Any, low: Any, high: Any, symbols: tuple[int, ...] | None = None) -> Part:
    """Describe an array by its specification.

    Args:
        name, shape, dtype: of the array. A number without axes becomes an array of one element.
        low, high: its bounds, numbers or arrays.
        symbols: the number of symbols of each channel, where the bounds do not tell it.

    Raises:
        Unreadable: integers have no bounds, or too wide ones.
    """
    shape, dtype = tuple(shape) or (1,), np.dtype(dtype)
    if symbols is not None:
        return Part(name, shape, "symbols", symbols)
    if dtype == np.bool_ or np.issubdtype(dtype, np.floating):
        return Part(name, shape, "numbers")
    if dtype == np.uint8 and len(shape) == 3 and is_image(shape):
        return Part(name, shape, "pixels")
    lowest, highest = int(np.min(low)), int(np.max(high))
    values = highest - lowest + 1
    if values <= MOST_SYMBOLS and values * prod(shape) <= LARGEST_CODE:
        return Part(name, shape, "symbols", (values,) * shape[-1], lowest)
    if values <= LARGEST_COUNT:
        return Part(name, shape, "counts", (values,), lowest)
    raise Unreadable(f"{name} has integers from {lowest} to {highest}, without useful bounds")


def is_image(shape: Sequence[int]) -> bool:
    """Return True if the last two or the first two of three axes are large enough for the encoder of frames."""
    return len(shape) == 3 and max(min(shape[1:]), min(shape[:2])) >= SMALLEST_FRAME


def is_grid(shape: Sequence[int]) -> bool:
    """Return True if three axes are those of a grid of cells, [height, width, channels], for the encoder of small maps."""
    return len(shape) == 3 and min(shape[:2]) >= 3 and max(shape[:2]) < SMALLEST_FRAME


def unreadable(shape: Sequence[int]) -> str | None:
    """Return why no encoder reads an observation of this shape, or None if one does."""
    if len(shape) != 3 or is_image(shape) or is_grid(shape):
        return None
    return (
        f"observations of shape {list(shape)}: must be frames of {SMALLEST_FRAME} or more pixels along each axis, with "
        f"channels first or last, or a grid, [height, width, channels], of 3 to {SMALLEST_FRAME - 1} cells along each axis"
    )


def channels_first(shape: Sequence[int]) -> bool:
    """Return True if an image's first axis is its smallest, as in [4, 84, 84]; False for [72, 96, 4]."""
    return shape[0] < shape[-1]


def packed_dtype(parts: Sequence[Part]) -> Any:
    """Return the smallest dtype that holds all parts."""
    if any(part.kind == "numbers" for part in parts):
        return jnp.float32
    small = all(part.lowest >= 0 and part.lowest + max(part.values, default=0) <= 256 for part in parts)
    return jnp.uint8 if small else jnp.int32


def pack(arrays: Mapping[str, Shaped[Array, "B ..."]], parts: Sequence[Part]) -> Num[Array, "B d"]:
    """Return the arrays that the parts name as one array. Its axis has the elements of one part after the other."""
    flat = [arrays[part.name].reshape(-1, prod(part.shape)).astype(packed_dtype(parts)) for part in parts]
    return jnp.concatenate(flat, axis=1)


def unpack(packed: Num[Array, "N d"], parts: Sequence[Part]) -> list[Num[Array, "N ..."]]:
    """Return the array of each part; the inverse of `pack`, up to dtypes."""
    ends = np.cumsum([prod(part.shape) for part in parts])
    pieces = jnp.split(packed, ends[:-1], axis=1)
    return [piece.reshape(-1, *part.shape) for piece, part in zip(pieces, parts, strict=True)]
