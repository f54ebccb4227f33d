"""What an offline run wrote for W&B."""

from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 2**15
HEADER = 7  # of the file and of each piece


def records(folder: Path) -> list[Record]:
    """The records of the one run under the folder, or of the run whose folder it is. The file is LevelDB's log: pieces that
    never cross a block of 32 KiB."""
    (path,) = [*folder.glob("**/offline-run-*/run-*.wandb"), *folder.glob("run-*.wandb")]
    data, found, parts, at = path.read_bytes(), [], b"", HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(folder: Path) -> list[dict[str, str]]:
    """What was logged, an entry for each time, values in JSON."""
    rows = [record.history.item for record in records(folder)]
    return [{item.key or "/".join(item.nested_key): item.value_json for item in row} for row in rows if row]


def exit_codes(folder: Path) -> list[int]:
    """How the run ended, as often as it was told."""
    return [record.exit.exit_code for record in records(folder) if record.HasField("exit")]
