"""Reads the fields of a protocol-buffer message (protobuf.dev/programming-guides/encoding) without its schema.

TensorFlow's checkpoints (`conversion/tf_bundle.py`) and SentencePiece's models (`corpora/vocabulary.py`) consist
of such messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a message."""

    number: int
    value: int | bytes
    """Its value; for a floating-point number, its bits."""
    begin: int
    """Where the value begins in the message, after the field's tag and length ..."""
    end: int
    """... and where it ends, with the field."""


def fields(message: bytes, begin: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of a message, or of the one inside it from `begin` to `end`, in order.

    Raises:
        IndexError, ValueError: it is truncated, or not a message.
    """
    end = len(message) if end is None else end
    while begin < end:
        tag, begin = varint(message, begin)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, stop = varint(message, begin)
        elif kind in (1, 5):
            stop = begin + (8 if kind == 1 else 4)
            value = int.from_bytes(message[begin:stop], "little")
        elif kind == 2:
            size, begin = varint(message, begin)
            stop = begin + size
            value = message[begin:stop]
        else:
            raise ValueError(f"field of wire type {kind}")
        if stop > end:
            raise ValueError("truncated")
        yield Field(tag >> 3, value, begin, stop)
        begin = stop


def varint(message: bytes, place: int) -> tuple[int, int]:
    """The integer at `place`, in groups of seven bits, lowest first, and where it ends."""
    value = shift = 0
    while message[place] & 0x80:
        value |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return value | message[place] << shift, place + 1


def as_varint(value: int) -> bytes:
    """The inverse of `varint`."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
