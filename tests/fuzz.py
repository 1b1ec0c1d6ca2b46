"""Fuzzing of every reader: valid files, damaged in many ways; whatever comes, a UserError or a result.

    python -m tests.fuzz --inputs 100000 --seed 0 [--readers text rows ...] [--json FILE]

Input number i of a reader is a pure function of (seed, reader, i), so a finding can be repeated:
`python -m tests.fuzz --readers text --seed 0 --first 1234 --inputs 1`. Inputs run in child processes that may take
SECONDS each (a signal ends a slow one, a watchdog a hanging one) and MEMORY more than they had at their start
(RLIMIT_AS); a child that dies is a finding, too. A finding is anything but a result or a UserError.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 20
MEMORY = 2 << 30
CHUNK = 10_000  # inputs per child

NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"9223372036854775808",
    b"-0.0",
    b"1" * 400,
    b"3.5",
    b"true",
    b"null",
    b"[]",
)
PIECES = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\r",
    b"\n\n",
    b"\t\t",
    b'"',
    b"\\ud800",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b" " * 5000,
    b"x" * 200_000,
    b"../../../etc/passwd",
    b"\x1f\x8b",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    1e308,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
    [None],
    {"": 0},
    "9" * 50,
    0.5,
    [1, "a"],
)


def damaged(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """`content` with one to four damages; `other` is a file to take pieces from."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(len(content) + 1)
        size = draw.choice((1, 1, 2, 4, 8, 64, 512))
        kind = draw.randrange(10)
        if kind == 0 and content:
            flipped = bytearray(content)
            flipped[place % len(content)] ^= 1 << draw.randrange(8)
            content = bytes(flipped)
        elif kind == 1:
            content = content[:place] + draw.randbytes(size) + content[place + size :]
        elif kind == 2:
            content = content[:place] + content[place + size :]
        elif kind == 3:
            content = content[:place]
        elif kind == 4:
            content = content[:place] + draw.choice(PIECES) + content[place:]
        elif kind == 5:
            content = content[:place] + content[place : place + size] * draw.choice((2, 2, 50)) + content[place:]
        elif kind == 6 and (found := list(re.finditer(rb"\d+", content[:200_000]))):
            match = draw.choice(found)
            content = content[: match.start()] + draw.choice(NUMBERS) + content[match.end() :]
        elif kind == 7 and other:
            start = draw.randrange(len(other))
            content = content[:place] + other[start : start + size] + content[place + size :]
        else:
            content = _other_json(content, draw)
    return content


def _other_json(content: bytes, draw: random.Random) -> bytes:
    """A JSON document, or a line of one per line, with a node exchanged, dropped or renamed; else `content`."""
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    for part in (content, lines[place]):
        try:
            document = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if not isinstance(document, dict | list) or not document:
            continue
        _change(document, draw)
        changed = json.dumps(document).encode("utf-8", "surrogatepass")
        return changed if part is content else b"\n".join([*lines[:place], changed, *lines[place + 1 :]])
    return content


def _change(document: Any, draw: random.Random) -> None:
    """One node of a JSON document: go down at random, then change what is there."""
    while True:
        key = draw.choice(list(document)) if isinstance(document, dict) else draw.randrange(len(document))
        inner = document[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.75:
            document = inner
            continue
        if draw.random() < 0.2:
            del document[key]
        elif isinstance(document, dict) and draw.random() < 0.1:
            document[draw.choice(("", "x", str(key) + " "))] = document.pop(key)
        else:
            document[key] = draw.choice(VALUES)
        return


def run_child(reader_name: str, seed: int, first: int, count: int) -> None:
    """Runs some inputs of a reader; prints a JSON line before each finding's end, and one with the counts."""
    from fuzz_readers import READERS

    from electra_core.errors import UserError

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[reader_name](Path(folder))
        _limit_memory()
        signal.signal(signal.SIGALRM, _too_slow)
        outcomes: Counter[str] = Counter()
        for index in range(first, first + count):
            print(json.dumps({"at": index}), flush=True)
            draw = random.Random(f"{seed} {reader_name} {index}")
            faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
            signal.alarm(SECONDS)
            try:
                reader(draw)
                outcomes["read"] += 1
            except UserError as error:
                message = str(error)
                outcomes["refused"] += 1
                if "Traceback" in message:
                    _report(index, error)
            except BaseException as error:
                outcomes["findings"] += 1
                _report(index, error)
            finally:
                signal.alarm(0)
                faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"outcomes": outcomes}), flush=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def _report(index: int, error: BaseException) -> None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "electra_core" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    finding = {"index": index, "error": type(error).__name__, "where": where, "message": str(error)[:200]}
    print(json.dumps({"finding": finding}), flush=True)


def run_reader(name: str, seed: int, first: int, count: int) -> dict[str, Any]:
    """All inputs of a reader, in children."""
    outcomes: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    start, end = time.monotonic(), first + count
    while first < end:
        size = min(CHUNK, end - first)
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--seed",
            str(seed),
            "--first",
            str(first),
            "--inputs",
            str(size),
        ]
        done = subprocess.run(command, capture_output=True)
        records = [json.loads(line) for line in done.stdout.decode().strip().split("\n") if line.startswith("{")]
        findings += [record["finding"] for record in records if "finding" in record]
        if records and "outcomes" in records[-1]:
            outcomes.update(records[-1]["outcomes"])
            first += size
            continue
        places = [record["at"] for record in records if "at" in record]
        last = places[-1] if places else first
        outcomes.update({"findings": 1, "before a death": last - first})
        trouble = done.stderr.decode(errors="replace").strip()[-300:]
        findings.append({"index": last, "error": f"died ({done.returncode})", "where": "?", "message": trouble})
        first = last + 1
    return {
        "inputs": count,
        **outcomes,
        "seconds": round(time.monotonic() - start, 1),
        "different_findings": _different(findings),
    }


def _different(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One finding of each kind, with how many there were."""
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in findings:
        kind = kinds.setdefault((finding["error"], finding["where"]), {**finding, "times": 0})
        kind["times"] += 1
    return list(kinds.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all, shared out among the readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--readers", nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if options.child:
        run_child(options.child, options.seed, options.first, options.inputs)
        return 0
    from fuzz_readers import READERS

    names = options.readers or list(READERS)
    result: dict[str, Any] = {"seed": options.seed, "first": options.first, "readers": {}}
    for place, name in enumerate(names):
        count = options.inputs * (place + 1) // len(names) - options.inputs * place // len(names)
        result["readers"][name] = run_reader(name, options.seed, options.first, count)
        print(json.dumps({name: result["readers"][name]}), flush=True)
        result["inputs"] = sum(reader["inputs"] for reader in result["readers"].values())
        result["findings"] = sum(reader.get("findings", 0) for reader in result["readers"].values())
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
