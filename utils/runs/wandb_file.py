"""Read the file that W&B writes on this machine, to know what it contains."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 2**15, 7  # the file is a LevelDB log: pieces with a header each, which never cross a block


def records(path: Path) -> Iterator[Any]:
    """Yield the intact records of a `run-*.wandb` file (`wandb.proto.wandb_internal_pb2.Record`) up to the first damage."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    data, parts, at = path.read_bytes(), b"", HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts, at = parts + data[at + HEADER : at + HEADER + size], at + HEADER + size
        if at > len(data) or kind not in (1, 2, 3, 4):  # cut off, or the zeros of a file system after a crash
            return
        if kind in (1, 4):  # a whole record, or its last piece
            try:
                yield Record.FromString(parts)
            except DecodeError:
                return
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return the rows that were logged, one for each step."""
    rows = [record.history.item for record in records(path)]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows if row]


def last_step(path: Path) -> int | None:
    """Return the last `global_step` in the file: 0 if there is none, and None if the file is gone."""
    try:
        return max((int(row["global_step"]) for row in history(path) if "global_step" in row), default=0)
    except OSError:
        return None
