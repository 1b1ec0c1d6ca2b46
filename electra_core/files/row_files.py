"""Reads files of rows as a stream of named cells: CSV, TSV, JSON lines, Parquet, plain lines, standard input.

Lines come from `text_lines.py`. Bytes that are not UTF-8 don't stop the stream; the row that holds them has
`problem` set, so that the caller can name it, skip it or stop.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.byte_files import COMPRESSED_SUFFIXES, OTHER_ENCODING, TO_UTF8
from electra_core.files.delimited import begun, split_cells
from electra_core.files.text_lines import check_exists, read_lines, text_problem

HUB = "hub:"
CARRIAGE_RETURNS = "a carriage return inside a line; if it should end the line: tr '\\r' '\\n' < OLD > NEW"
QUOTES_IN_TSV = "quotes in a TSV are ordinary characters; only a .csv may have quoted cells"
PLAIN_LINES = "a .txt holds one text per line; rename a file of columns to .csv or .tsv"
FORMS = {"lines": ".txt", "jsonl": ".jsonl", "csv": ".csv", "tsv": ".tsv"}
"""Formats that a user may name for any file -> the suffix that stands for the same format."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_ROWS = 256  # at a time: texts can be a megabyte each
JSON_ARRAY = re.compile(r"\s*\[\s*(\{|$|\]\s*$)")
"""The beginning of an array of rows, or an empty one; a plain text may also begin with a bracket."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character beyond U+FFFF in JSON's escapes: fine with its other half, invalid alone."""


@dataclass(slots=True)
class Row:
    """One record: `cells` by column name, its place (line or record, from 1), and what is wrong with it."""

    line: int
    cells: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def format_of(path: Path, form: str = "") -> str:
    """The file's format: `form`'s, one of `FORMS`; if "", by its suffix, compression aside: ".csv", ".txt", ..."""
    if form:
        return FORMS[form]
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return bare.suffix.lower()


def other_encoding(path: Path) -> str:
    """What to do about a file that is not UTF-8: only of tables and folders can the encoding be named."""
    return OTHER_ENCODING if format_of(path) in DELIMITERS or path.is_dir() else TO_UTF8


def read_rows(
    path: Path,
    *,
    header: bool | None = None,
    wanted: Sequence[str] = (),
    quoting: bool | None = None,
    encoding: str | None = None,
    form: str = "",
) -> Iterator[Row]:
    """Yields the rows of a CSV, TSV, JSON-lines, Parquet or plain file (a text per line, the column `text`).

    `hub:NAME`, `hub:NAME:SPLIT` and `hub:NAME:CONFIGURATION:SPLIT` are data sets of the Hub, read by its library.

    Args:
        header: whether the first line of a CSV or TSV names the columns. None: it does if it holds one of
            `wanted`, perhaps with capitals. Columns of a file without header are called "1", "2", ...
        quoting: whether cells may be quoted. None: in CSV yes, in TSV no (the GLUE files have bare quotes).
        encoding: of a CSV or TSV; None: UTF-8.
        form: the file's format, one of `FORMS`; "": as its name says.

    Raises:
        UserError: the file is missing, unreadable, or of unknown format.
    """
    if str(path).startswith(HUB):
        return _read_hub(str(path))
    check_exists(path)
    kind = format_of(path, form)
    if kind in DELIMITERS:
        quoting = kind == ".csv" if quoting is None else quoting
        return _read_delimited(path, kind, header, wanted, quoting=quoting, encoding=encoding)
    if kind in (".jsonl", ".ndjson", ".json"):
        return _read_json_lines(path, may_be_array=kind == ".json" or bool(form))
    if kind == ".parquet":
        return _read_parquet(path)
    if kind == ".txt" or str(path) == "-":
        return _read_plain(path, may_be_json=str(path) == "-" and not form)
    raise UserError(
        f"{path}: unknown format {kind or '(no suffix)'}; expected .csv, .tsv, .jsonl, .parquet or .txt"
    )


def _read_delimited(
    path: Path, kind: str, header: bool | None, wanted: Sequence[str], *, quoting: bool, encoding: str | None
) -> Iterator[Row]:
    names: list[str] | None = None
    has_header = False
    for line, cells, problem in _split_cells(path, kind, quoting, encoding):
        if names is None and not problem:
            stripped = [cell.strip() for cell in cells]
            in_any_case = {*stripped, *map(str.lower, stripped)}
            has_header = header if header is not None else not wanted or not in_any_case.isdisjoint(wanted)
            names = _header(path, stripped) if has_header else [str(number + 1) for number in range(len(cells))]
            if has_header:
                continue
        if names is None and header is False:  # a broken row; the next one tells how many columns there are
            yield Row(line, {}, problem)
            continue
        names = names or []
        if len(names) > 1 and not problem:
            stripped = [cell.strip() for cell in cells]
            if not any(stripped):
                continue  # spreadsheets leave empty rows after the last one
            if has_header and stripped == names:
                problem = "repeated header (of another file that was appended to this one?)"
        if not problem and len(cells) != len(names):
            problem = f"expected {len(names)} columns, got {len(cells)}"
            if not quoting and any(cell.startswith('"') for cell in cells):
                problem += f" ({QUOTES_IN_TSV})"
        yield Row(line, dict(zip(names, cells)), problem or text_problem("\t".join(cells), encoding))


def _header(path: Path, names: list[str]) -> list[str]:
    if "\r" in "".join(names):
        raise UserError(f"{path}: {CARRIAGE_RETURNS}")
    return _distinct(path, names)


def _distinct(path: Path, names: list[str]) -> list[str]:
    """The columns' names, checked for duplicates: rows are dicts, which would keep only one of two equal names."""
    twice = next((name for name, times in Counter(names).items() if name and times > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are named {twice!r}; rename one of them")
    return names


def _split_cells(
    path: Path, kind: str, quoting: bool, encoding: str | None
) -> Iterator[tuple[int, list[str], str]]:
    """(line, cells, problem) for every non-blank line."""
    if kind == ".tsv" and not quoting:
        for number, line in read_lines(path, encoding):
            if line:
                yield number, line.split("\t"), ""
        return
    delimiter, spaced, lines = begun((line for _, line in read_lines(path, encoding)), tabs=kind == ".tsv")
    for row in split_cells(lines, delimiter, spaced, quoting=quoting):
        yield row.first, row.cells, _csv_problem(row.error, row.first, row.last) if row.error else ""


def _csv_problem(error: csv.Error, first: int, last: int) -> str:
    if "new-line character" in str(error):
        return CARRIAGE_RETURNS
    where = f", lines {first} to {last} are lost" if last > first else ""
    return f"broken quoting ({error}{where})"


def _read_json_lines(path: Path, *, may_be_array: bool) -> Iterator[Row]:
    lines = read_lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if may_be_array and line.lstrip().startswith("["):
            yield from _json_array(path, itertools.chain([(number, line)], lines))
            return
        may_be_array = False
        yield _parse_json(number, line)


def _parse_json(number: int, line: str) -> Row:
    if problem := text_problem(line):
        return Row(number, {}, problem)
    try:
        return _json_row(number, json.loads(line), bool(SURROGATE.search(line)))
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON ({error})")


def _read_plain(path: Path, *, may_be_json: bool) -> Iterator[Row]:
    """One text per line; standard input may also hold JSON lines or an array, as its beginning shows."""
    lines: Iterator[tuple[int, str]] = ((number, line) for number, line in read_lines(path) if line.strip())
    if not may_be_json or (first := next(lines, None)) is None:
        yield from (_plain_row(number, line) for number, line in lines)
        return
    lines = itertools.chain([first], lines)
    if JSON_ARRAY.match(first[1]):
        yield from _json_array(path, lines)
    elif first[1].lstrip().startswith("{"):
        yield from (_parse_json(number, line) for number, line in lines)
    else:
        yield from (_plain_row(number, line) for number, line in lines)


def _plain_row(number: int, line: str) -> Row:
    return Row(number, {"text": line}, text_problem(line))


def _json_array(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    text = "\n".join(line for _, line in lines)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        name = "standard input" if str(path) == "-" else path
        raise UserError(f"{name}: not JSON ({error})") from None
    suspect = bool(SURROGATE.search(text))
    for number, record in enumerate(records, 1):
        yield _json_row(number, record, suspect)


def _json_row(number: int, record: Any, suspect: bool) -> Row:
    """A record as a row; if `suspect`, checks it for lone surrogates, which could not be written out."""
    if not isinstance(record, dict):
        return Row(number, {}, f"expected a JSON object, got {type(record).__name__}")
    return Row(number, record, text_problem(json.dumps(record, ensure_ascii=False)) if suspect else "")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs: pip install 'electra-core[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _distinct(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, cells)
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # invalid text or dates
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None


def _read_hub(source: str) -> Iterator[Row]:
    """Rows of a Hub data set; class numbers become its class names, and -1, the Hub's "unknown", becomes None."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading data sets from the Hub needs: pip install datasets") from None
    name, *rest = source.removeprefix(HUB).split(":")
    *configuration, split = rest or ["train"]
    try:
        data = datasets.load_dataset(name, *configuration, split=split)
    except Exception as error:  # the library's, the network's or the disk's: all the same to the user
        raise UserError(f"{source}: cannot be loaded ({str(error).strip() or type(error).__name__})") from None
    for number, cells in enumerate(data, 1):
        yield Row(number, {key: _named(value, data.features.get(key)) for key, value in cells.items()})


def _named(value: Any, feature: Any) -> Any:
    """A class number, or a list of them, as class names."""
    names = getattr(feature, "names", None)
    if names is not None and isinstance(value, int):
        return names[value] if value >= 0 else None
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_named(item, feature.feature) for item in value]
    return value
