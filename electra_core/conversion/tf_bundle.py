"""Reads the variables of a TensorFlow checkpoint without TensorFlow.

A checkpoint PREFIX (format 2, "tensor bundle", tensorflow/core/util/tensor_bundle) is

    PREFIX.index                    a sorted table: name -> dtype, shape, shard, offset, size
    PREFIX.data-00000-of-00001      the values, one after the other

The table is LevelDB's (github.com/google/leveldb, doc/table_format.md): blocks of entries whose keys omit the
prefix shared with the previous key, an index block with a handle for each block, and a footer of 48 bytes.
TensorFlow writes it uncompressed. Entries are protocol buffers (tensor_bundle.proto), of which only the necessary
fields are decoded. Sizes are checked against the shapes and the files; checksums are not verified.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from electra_core.errors import UserError
from electra_core.files.protobuf import fields, varint

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES, _BLOCK_TRAILER_BYTES = 48, 5
_LARGEST_INDEX = 64 << 20  # bytes; a variable takes some fifty
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # DataType in types.proto; float to half


@dataclass(frozen=True)
class Variable:
    """The location of one variable's values."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    def read(self) -> np.ndarray:
        """The values."""
        count = math.prod(self.shape)
        return np.fromfile(self.file, self.dtype, count, offset=self.offset).reshape(self.shape)


def read_bundle(prefix: Path) -> dict[str, Variable]:
    """Name -> variable for the checkpoint PREFIX, numeric variables only; reads nothing but the index.

    Raises:
        UserError: the checkpoint is missing, damaged, or of an unsupported kind.
    """
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise UserError(f"{prefix}: no TensorFlow checkpoint ({index.name} is missing)")
    if (size := index.stat().st_size) > _LARGEST_INDEX:
        raise UserError(f"{index}: {size:,} bytes is too large for the index of a TensorFlow checkpoint")
    try:
        table = dict(_entries(index.read_bytes()))
        header = _by_number(table.pop(b""))
        shards = header.get(1, 1)
        if header.get(2, 0) != 0:
            raise UserError(f"{index}: written by a big-endian machine, which is not supported")
        variables = {key.decode(): _variable(prefix, key.decode(), value, shards) for key, value in table.items()}
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise UserError(f"{index}: damaged or not the index of a TensorFlow checkpoint ({error!r})") from error
    return {name: variable for name, variable in variables.items() if variable is not None}


def _variable(prefix: Path, name: str, value: bytes, shards: int) -> Variable | None:
    """The variable described by an entry of the table; None if it is not numeric."""
    entry = _by_number(value)
    if entry.get(1) not in _DTYPES:
        return None
    if 7 in entry:
        raise UserError(f"{prefix}: {name} is a partitioned variable, which is not supported")
    shape = [field.value for field in fields(entry.get(2, b"")) if isinstance(field.value, bytes)]
    dims = [_by_number(dim).get(1, 0) for dim in shape]
    number, offset, size = (entry.get(key, 0) for key in (3, 4, 5))
    file = Path(f"{prefix}.data-{number:05d}-of-{shards:05d}")
    dtype = _DTYPES[entry[1]]
    if size != math.prod(dims) * np.dtype(dtype).itemsize:
        raise ValueError(f"{name}: {size} bytes for shape {dims}")
    if not file.is_file() or offset + size > file.stat().st_size:
        raise UserError(f"{file}: missing or truncated; {name} is incomplete")
    return Variable(tuple(dims), dtype, file, offset)


def _entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the table."""
    footer = table[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("no table footer")
    _, _, position = _handle(footer, 0)  # of the meta index
    offset, size, _ = _handle(footer, position)
    for _, handle in _block(table, offset, size):
        yield from _block(table, *_handle(handle, 0)[:2])


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if offset + size + _BLOCK_TRAILER_BYTES > len(table):
        raise ValueError("a block lies outside the file")
    if table[offset + size] != 0:
        raise ValueError("a compressed block")
    block = table[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end, position, key = len(block) - 4 - 4 * restarts, 0, b""
    while position < end:
        shared, position = varint(block, position)
        own, position = varint(block, position)
        length, position = varint(block, position)
        key = key[:shared] + block[position : position + own]
        position += own
        yield key, block[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Offset and size of a block, and where its handle ends."""
    offset, position = varint(data, position)
    size, position = varint(data, position)
    return offset, size, position


def _by_number(message: bytes) -> dict[int, Any]:
    """Field number -> value, for a message in which each field occurs once."""
    return {field.number: field.value for field in fields(message)}
