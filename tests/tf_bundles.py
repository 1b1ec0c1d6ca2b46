"""Writes TensorFlow 1 checkpoints, from the format's description, with what a reader can stumble over (several
blocks, keys that share beginnings, a second data file)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A table block that restarts its keys every three entries; with its trailer."""
    out, restarts, previous = b"", [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % 3 == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + b"\0" + b"crc!"


def write_bundle(prefix: Path, variables: dict[str, np.ndarray], shards: int = 1) -> None:
    codes = {"float32": 1, "int64": 9, "float16": 19}
    files = [bytearray() for _ in range(shards)]
    entries = [(b"", field(1, shards) + field(3, field(1, 1)))]
    for number, name in enumerate(sorted(variables)):
        value, shard = variables[name], number % shards
        shape = b"".join(field(2, field(1, size)) for size in value.shape)
        location = field(3, shard) + field(4, len(files[shard])) + field(5, value.nbytes)
        checksum = varint(6 << 3 | 5) + b"\1\2\3\4"
        entries.append((name.encode(), field(1, codes[value.dtype.name]) + field(2, shape) + location + checksum))
        files[shard] += np.ascontiguousarray(value).tobytes()
    for number, content in enumerate(files):
        Path(f"{prefix}.data-{number:05d}-of-{shards:05d}").write_bytes(content)
    table, handles = b"", []
    for start in range(0, len(entries), 7):
        part = block(entries[start : start + 7])
        handles.append((entries[start : start + 7][-1][0] + b"~", varint(len(table)) + varint(len(part) - 5)))
        table += part
    meta, index = block([]), block(handles)
    footer = varint(len(table)) + varint(len(meta) - 5) + varint(len(table) + len(meta)) + varint(len(index) - 5)
    footer = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(table + meta + index + footer)
