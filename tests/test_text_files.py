"""Readers of text: what comes out as documents, and what bad input is told."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from electra_core.corpora import text_files, text_tables
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import ReadReport, document_hash, read_documents, spool
from electra_core.errors import UserError
from electra_core.files.byte_files import ByteFile
from electra_core.files.delimited import delimiter_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXT = "Title\nFirst line.\n\n \nSecond\u0085document\u2028here\x0c.\r\nIts end, naïve\n"
DOCUMENTS = [["Title", "First line."], ["Second\u0085document\u2028here\x0c.", "Its end, naïve"]]

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:]),  # two frames
}


def read(*paths: Path | str, report: ReadReport | None = None, text_field: str = "text") -> list[list[str]]:
    return list(read_documents(find_sources(list(paths)), report=report, text_field=text_field))


def as_bytes(kind: str) -> bytes:
    rows = ["\n".join(document) for document in DOCUMENTS]
    if kind == ".txt":
        return TEXT.encode()
    if kind in (".jsonl", ".ndjson", "lines.json"):
        return "".join(f"{json.dumps({'id': 1, 'text': row})}\n\n" for row in rows).encode()
    if kind.endswith(".json"):
        indent = 2 if kind == "indented.json" else None
        return json.dumps([{"id": 1, "text": row} for row in rows], indent=indent, ensure_ascii=False).encode()
    if kind.endswith(".csv"):
        table = io.StringIO()
        delimiter = ";" if kind == "semicolons.csv" else ","
        writer = csv.writer(table, delimiter=delimiter)
        writer.writerows([("id", "text"), ("1; 2", rows[0]), ("3", ""), (), ('"4"', rows[1])])
        return table.getvalue().encode()
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": [rows[0], None, rows[1]]}), stream)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    "kind",
    [
        ".txt", ".jsonl", ".ndjson", ".parquet", "lines.json", "array.json", "indented.json", ".csv",
        "semicolons.csv",
    ],
)  # fmt: skip
def test_formats_and_compressions(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"text{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](as_bytes(kind)))
    report = ReadReport()
    assert read(path, report=report) == DOCUMENTS
    assert 0 < report.position <= path.stat().st_size
    assert report.notes() == []


def test_quotes_in_a_tsv_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext \n1\t"Yes, he said.\n\n2\tNo\r\n')
    assert read(tmp_path / "a.tsv") == [['"Yes, he said.'], ["No"]]


def test_rows_of_json_need_no_lines(tmp_path: Path) -> None:
    for content in (
        '{\n "text":\n "a"}\n {"text": "b"\n}{"text": "c"}',
        '[{"text": "a"},{"text":\n"b"} ,\n{"text": "c"}\n]\n',
    ):
        (tmp_path / "a.json").write_text(content)
        assert read(tmp_path / "a.json") == [["a"], ["b"], ["c"]]


def test_a_folder_of_tables_and_one_of_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside texts a table may be about them; alone it is the text. What is skipped is counted, in one line."""
    caplog.set_level("INFO")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "a"}]'))
    (tmp_path / "b.csv").write_text("text\nb\n")
    for name in ("c.md", "LICENSE", "d.py", "e.PY.xz"):
        (tmp_path / name).write_text("no text")
    assert read(tmp_path) == [["a"], ["b"]]
    (tmp_path / "c.ndjson").write_text('{"text": "c"}')
    assert read(tmp_path) == [["c"]]
    assert caplog.messages == [
        f"{tmp_path}: skipped {counts} (to read such a file, name it)"
        for counts in ("1 .md, 2 .py, 1 without suffix", "1 .csv, 1 .json, 1 .md, 2 .py, 1 without suffix")
    ]


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".md"])
def test_a_file_may_be_one_document(tmp_path: Path, kind: str) -> None:
    """Of plain text, packed or not; a row of the others is one in any case."""
    content = "\n\none\ntwo\n\n \t\nthree\n\n"
    path = tmp_path / f"a{kind}"
    path.write_bytes(gzip.compress(content.encode()) if kind.endswith(".gz") else content.encode())
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "x\\n\\ny"}\n{"text": "z"}\n')
    sources = find_sources([path, rows])
    assert list(read_documents(sources, documents="file")) == [["one", "two", "three"], ["x", "y"], ["z"]]
    assert list(read_documents(sources))[:2] == [["one", "two"], ["three"]]
    with pytest.raises(UserError, match="contains no text"):
        path.write_bytes(gzip.compress(b"\n \n") if kind.endswith(".gz") else b"\n \n")
        list(read_documents(sources, documents="file"))


def test_a_file_beyond_the_limit_of_documents_is_cut_between_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("four\n\nfour\n\nfour\n")
    report = ReadReport()
    found = list(read_documents(find_sources([tmp_path / "a.txt"]), documents="file", report=report))
    assert found == [["four", "four"], ["four"]] and report.cut_documents == 1


def test_an_unknown_suffix_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("a.md", "b.md.gz", "c.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith("gz") else b"text")
    find_sources([tmp_path / "a.md", tmp_path / "c.txt"])
    find_sources([tmp_path / "a.md", tmp_path / "b.md.gz"])
    find_sources([tmp_path / "c.txt", "-"])
    assert caplog.messages == [
        f"{name}: no known suffix, read as plain text" for name in (tmp_path / "a.md", "2 .md")
    ]


def test_folders_files_and_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", "c.md", ".hidden.txt", ".git/x.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        (tmp_path / name).write_text("" if name == "empty.txt" else text)
    report = ReadReport()
    assert read(tmp_path, tmp_path / "c.md", report=report) == [["a.jsonl"], ["b/10.txt"], ["b/2.txt"], ["c.md"]]
    assert report.notes() == ["1 of the files are empty"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give() -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))

    give()
    assert read("-") == DOCUMENTS
    give()
    (spooled,) = [spool(source, tmp_path) for source in find_sources(["-"])]
    assert list(read_documents([spooled])) == DOCUMENTS and spooled.name == "standard input"
    with pytest.raises(UserError, match="only once"):
        find_sources(["-", "-"])


def test_blank_lines_before_the_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n \nid;text\n1;one, two\n")
    assert read(tmp_path / "a.csv") == [["one, two"]]
    (tmp_path / "a.csv").write_text("\n \nid;text\n\n1;one;two\n")
    with pytest.raises(UserError, match="line 5: expected 2 columns, got 3; cells that contain ';' need quotes"):
        read(tmp_path / "a.csv")


def test_byte_order_mark_and_missing_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path / "a.txt") == [["one", "two"]]


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83db \ud83d\ude00"}')
    assert read(tmp_path / "a.jsonl") == [["a\ufffdb 😀"]]


def test_document_hash_depends_on_the_text_only() -> None:
    assert document_hash(["a", "b"], 0, b"split") == document_hash(["a", "b"], 0, b"split") < 1 << 64
    others = [(["a b"], 0, b"split"), (["a", "b"], 1, b"split"), (["a", "b"], 0, b"sample")]
    assert len({document_hash(*other) for other in others} | {document_hash(["a", "b"], 0, b"split")}) == 4


# ------------------------------------------------------------------------------------------------- what is large


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCK_BYTES", 16), ("MAX_LINE", 40), ("MAX_DOCUMENT_CHARACTERS", 100)):
        monkeypatch.setattr(text_files, name, value)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_lines_are_cut_at_white_space(tmp_path: Path, small_limits: None, kind: str) -> None:
    text = " ".join(f"word{number}" for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    report = ReadReport()
    documents = read(tmp_path / f"a.{kind}", report=report)
    lines = [line for document in documents for line in document]
    assert " ".join(line.strip() for line in lines) == text
    assert max(map(len, lines)) <= 40 and max(sum(map(len, document)) for document in documents) <= 100
    assert report.cut_lines == len(lines) - 1 and report.cut_documents == len(documents) - 1 > 0
    assert [note.split()[0] for note in report.notes()] == [str(report.cut_lines), str(report.cut_documents)]


def test_cuts_without_white_space_are_between_characters(tmp_path: Path, small_limits: None) -> None:
    text = "東京😀" * 50
    (tmp_path / "a.txt").write_text(text, "utf-8")
    assert "".join(line for document in read(tmp_path / "a.txt") for line in document) == text


def test_a_line_of_200_megabytes_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        left = 200_000_000

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
            size = min(len(buffer), self.left)
            buffer[:size] = (b"seven letters " * (size // 14 + 1))[:size]
            self.left -= size
            return size

    class Input:
        buffer = io.BufferedReader(Endless())

    monkeypatch.setattr("sys.stdin", Input())
    report = ReadReport()
    tracemalloc.start()
    try:
        size = sum(len(line) for document in read_lazily("-", report) for line in document)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == report.position == 200_000_000 and report.cut_lines > 100
    assert peak < 30e6


def read_lazily(path: str, report: ReadReport) -> Iterator[list[str]]:
    return read_documents(find_sources([path]), report=report)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_json_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
    monkeypatch.setattr(text_tables, "BLOCK_CHARACTERS", size)
    for kind in ("lines.json", "array.json", "indented.json"):
        (tmp_path / kind).write_bytes(as_bytes(kind))
        assert read(tmp_path / kind) == DOCUMENTS


@pytest.mark.parametrize(
    ("first_line", "expected"),
    [
        ("id,text", (",", False)), ("id; text", (";", True)), ("id\ttext\tone, two", ("\t", False)),
        ('"a, b; c",text', (",", False)),  # what is in quotes says nothing
    ],
)  # fmt: skip
def test_the_first_line_tells_what_a_table_is_cut_by(first_line: str, expected: tuple[str, bool]) -> None:
    assert delimiter_of(first_line) == expected


def test_a_large_array_and_a_large_table_need_little_memory(tmp_path: Path) -> None:
    text = "seven letters " * 1000
    with open(tmp_path / "a.json", "w") as array, open(tmp_path / "a.csv", "w") as table:
        array.write("[")
        table.write("text\n")
        for number in range(3000):
            array.write(("," if number else "") + json.dumps({"text": text}))
            table.write(f'"{text}"\n')
        array.write("]")
    for name in ("a.json", "a.csv"):
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_lazily(str(tmp_path / name), ReadReport())) == 3000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 10e6 < 42e6 <= (tmp_path / name).stat().st_size


def test_a_row_of_a_json_array_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "MAX_ROW_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text('[{"text": "x"},\n' + json.dumps({"text": "y" * (3 << 20)}) + "]")
    with pytest.raises(UserError, match="row 2: not JSON, or longer than 1 MiB"):
        read(tmp_path / "a.json")


def test_a_json_row_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + json.dumps({"text": "y" * (3 << 20)}))
    with pytest.raises(UserError, match="line 2 is longer than 1 MiB"):
        read(tmp_path / "a.jsonl")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: contains no text"),
        ("a.txt", b" \n\r\n", "a.txt: contains no text"),
        ("a.txt", b"PK\x03\x04\0\0", "a.txt: is a binary file"),
        ("a.txt", "text".encode("utf-16"), "a.txt: is UTF-16, expected UTF-8"),
        ("a.txt", "text".encode("utf-32"), "a.txt: is UTF-32, expected UTF-8; .* iconv -f UTF-32 "),
        ("a.txt", "text".encode("utf-16-le"), "a.txt: is a binary .*; if it is UTF-16 .*: iconv -f UTF-16LE "),
        (
            "a.txt",
            b"fine\nna\xefve\n",
            "a.txt: invalid UTF-8 at byte 7 .*: iconv -f CP1252 .*, GB18030 for Ch",
        ),
        ("a.txt", b"\xef\xbb\xbffine\n\xff", "a.txt: invalid UTF-8 at byte 8 "),
        ("a.txt", b"x" * 3_000_000 + b"\n\xc3", "a.txt: invalid UTF-8 at byte 3,000,001 "),
        ("a.txt.gz", b"no gzip", "a.txt.gz: the compressed file is damaged"),
        ("a.txt.xz", b"no xz", "a.txt.xz: the compressed file is damaged"),
        ("a.txt.zst", b"no zstandard", "a.txt.zst: the compressed file is damaged"),
        ("a.txt.gz", gzip.compress(b"word " * 9999, mtime=0)[:-20], "a.txt.gz: .*truncated"),
        ("a.txt.xz", lzma.compress(b"word " * 9999)[:-20], "a.txt.xz: .*truncated"),
        ("a.txt.zst", zstandard.compress(b"word " * 9999)[:-5], "a.txt.zst: .*truncated"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl: line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1: no field 'text'; the fields are 'body', 'id'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int, not text"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file"),
        (
            "a.json",
            b'[{"text": "x"}, {"text": "y"}',
            "a.json: expected , or ] after row 2, got the end of the file",
        ),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "a.json: expected , or ] after row 1, got {"),
        ("a.json", b'[{"text": "x"},]', r"a.json: row 2: not JSON \(Expecting value\)"),
        ("a.json", b'[{"text": "x"}] {"text": "y"}', "a.json: expected nothing after the array of rows, got {"),
        ("a.json", b'["x"]', "a.json: row 1: expected a JSON object, got str"),
        ("a.json", b'{"text": "x"}\n{"text": "y\n', "a.json: row 2: not JSON"),
        ("a.json", b'{"data": [{"text": "x"}]}', "row 1: no field 'text'; the fields are 'data'"),
        ("a.json", b"[]", "a.json: contains no text"),
        ("a.json", b"[" * 100_000, "a.json: row 1: not JSON"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"a.json: invalid UTF-8 at byte 14 \(0xe9"),
        ("a.json", b'\xef\xbb\xbf[{"text": "caf\xc3', r"a.json: invalid UTF-8 at byte 17 \(0xc3"),
        ("a.json", "[]".encode("utf-16"), "a.json: is UTF-16"),
        ("a.csv", b"", "a.csv: contains no text"),
        ("a.csv", b"text\n", "a.csv: contains no text"),
        ("a.csv", b"id,body\n1,x\n", "a.csv: no column 'text' in the first line; the columns are 'id', 'body'"),
        ("a.csv", b"text,text\nx,y\n", "a.csv: two columns are named 'text'"),
        (
            "a.csv",
            b'id,text\n1,"x\ny"\n2,y,z\n',
            "a.csv: line 4: expected 2 columns, got 3; cells that contain ',' need quotes",
        ),
        ("a.csv", b'text\nx\n"y\nz\n', "a.csv: line 3: not CSV"),
        ("a.csv", b"text\nx\ry\n", "a.csv: line 2: not CSV"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: invalid UTF-8 at byte 8 "),
        ("a.tsv", b"id\ttext\n1\n", "a.tsv: line 2: expected 2 columns, got 1$"),
        ("a.tsv.gz", b"no gzip", "a.tsv.gz: the compressed file is damaged"),
        (
            "b.bz2",
            bz2.compress(b"text" * 99),
            "b.bz2: .bz2 files cannot be read; unpack it, or pack it as .gz, .xz or .zst",
        ),
        ("b.tar.gz", b"", "b.tar.gz: .tar files cannot be read; unpack it first"),
        ("b.XML", b"<a/>", "b.XML: .xml files cannot be read; save its text, without the tags, as .txt"),
        ("b.docx", b"PK", "b.docx: .docx files cannot be read; save its text as .txt"),
        ("b.arrow", b"", "b.arrow: .arrow files cannot be read; save its rows as .parquet or .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, "no column 'text'; the columns are 'body', 'id'"),
        ({"text": [1]}, "holds int64, not"),
    ],
)
def test_bad_parquet_columns(tmp_path: Path, columns: dict, message: str) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet")


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    text = pyarrow.array(["x"])
    columns = pyarrow.Table.from_arrays([text, text], names=["text", "text"])
    parquet.write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are named 'text'; rename one of them"):
        read(tmp_path / "a.parquet")


def test_missing_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_sources([tmp_path / "absent.txt"])
    with pytest.raises(UserError, match="no text file given"):
        find_sources([])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: no \.txt, .*, \.tsv file in this folder$"):
        find_sources([tmp_path / "folder"])
    (tmp_path / "folder" / "a.md").touch()
    with pytest.raises(UserError, match=r"folder: no .* file in this folder; found 1 \.md$"):
        find_sources([tmp_path / "folder"])
    with pytest.raises(UserError, match="Is a directory"):
        ByteFile("folder", tmp_path / "folder")

    def refuse(*_: object) -> None:  # as root, who may run this, can read everything
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read(tmp_path / "a.txt")


def test_a_single_path_is_not_taken_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    alone = [find_sources("books.txt"), find_sources(Path("books.txt"))]
    assert alone == [find_sources(["books.txt"])] * 2
