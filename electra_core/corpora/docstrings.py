"""The embedded corpus: documentation found on every machine that can run this project.

Docstrings of the standard library, of torch and of numpy, and the interpreter's own language reference
(`pydoc_data.topics`). Source files are parsed with `ast`; nothing is imported and nothing is downloaded.
Two things are made of it:

- a corpus for pre-training, in the shape that `electra prepare` reads (`write_corpus`);
- a labelled task, "which area of the library does this docstring belong to" (`labelled_task`). A module's
  documents are all in the training set or all in the development set, and names that give the answer away
  (dotted paths, import lines) are removed, so that only an area's style and vocabulary are left to go by.

`electra demo --texts-only` writes both (`sample.py`).

The documents depend on the installed versions of Python, torch and numpy; for given versions the result is the
same everywhere, order included.

Left out on purpose: test suites (Linux distributions ship Python without them), files whose docstrings all use
single quotes (not worth parsing), and repeated text.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from electra_core.errors import UserError

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
SHORTEST_DOCUMENT = 40  # characters: shorter ones ("Return the name.") say nothing about their area

# Label -> the modules that belong to it. The longest matching prefix wins. Chosen so that every class has
# at least a dozen modules in any Python >= 3.10 with the supported torch and numpy versions.
AREAS: dict[str, tuple[str, ...]] = {
    "neural networks": ("torch.nn", "torch.optim", "torch.ao.nn"),
    "probability": ("torch.distributions", "numpy.random", "random", "statistics"),
    "distributed training": ("torch.distributed",),
    "graph capture": ("torch._dynamo", "torch.fx", "torch.export", "torch._export", "torch.jit"),
    "code generation": ("torch._inductor",),
    "quantization": ("torch.ao.quantization", "torch.ao.pruning", "torch.ao.ns"),
    "accelerators": ("torch.cuda", "torch.xpu", "torch.mps", "torch.backends", "torch.accelerator"),
    "arrays": ("numpy._core", "numpy.lib", "numpy.ma", "numpy.linalg", "numpy.fft", "numpy.polynomial"),
    "concurrency": (
        "asyncio", "concurrent", "multiprocessing", "threading", "_threading_local", "queue", "sched",
        "subprocess", "selectors", "signal", "contextlib",
    ),
    "internet": (
        "email", "http", "urllib", "xmlrpc", "wsgiref", "smtplib", "imaplib", "poplib", "ftplib", "socket",
        "socketserver", "ssl", "mailbox", "ipaddress", "webbrowser", "nntplib", "telnetlib", "cgi",
    ),
    "files and archives": (
        "pathlib", "shutil", "tarfile", "zipfile", "gzip", "bz2", "lzma", "tempfile", "os", "io", "_pyio",
        "glob", "fnmatch", "posixpath", "ntpath", "genericpath", "fileinput", "filecmp", "shelve", "dbm",
        "pickle", "codecs", "zipapp", "zipimport", "netrc", "plistlib", "_compression", "linecache",
    ),
    "source code": (
        "ast", "inspect", "dis", "tokenize", "importlib", "pkgutil", "typing", "symtable", "compileall", "opcode",
        "py_compile", "traceback", "code", "codeop", "modulefinder", "runpy", "pdb", "bdb", "doctest", "unittest",
        "pydoc", "trace", "cProfile", "pstats", "profile", "tracemalloc", "_ast_unparse", "annotationlib",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One docstring: its cleaned `text`, the dotted `module`, its `area` ("" if none) and its `name`."""

    text: str
    module: str
    area: str
    name: str


@dataclass(frozen=True)
class Example:
    """One labelled example; `document` is where its text comes from."""

    text: str
    label: str
    document: Document


@dataclass(frozen=True)
class LabelledTask:
    """Training and development examples whose modules do not overlap. `labels` are in the order of `AREAS`."""

    train: list[Example]
    dev: list[Example]
    labels: list[str]


# ------------------------------------------------------------------------------------------ reading the sources


def documents() -> Iterator[Document]:
    """Every document of the corpus, each text once, in an order that depends on the sources alone.

    About 10 seconds on one core.

    Raises:
        UserError: no source file is found (a Python without its library's sources).
    """
    seen: set[str] = set()
    with _quick_parsing():
        for prefix, folder in _source_folders():
            for path in sorted(folder.rglob("*.py")):
                inner = path.relative_to(folder)
                if SKIPPED_FOLDERS.isdisjoint(inner.parts[:-1]):
                    for document in _file_documents(path, _module_name(prefix, inner)):
                        if document.text not in seen:
                            seen.add(document.text)
                            yield document
    if not seen:
        raise UserError("no Python sources found: the standard library, torch and numpy hold no .py files here")


@contextmanager
def _quick_parsing() -> Iterator[None]:
    """Silences warnings about escapes in old sources, and collects no garbage: trees hold no cycles (-25%)."""
    was_enabled = gc.isenabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def _source_folders() -> list[tuple[str, Path]]:
    """(module prefix, folder): the standard library, torch, numpy. `find_spec` of a top name imports nothing."""
    folders = [("", Path(sysconfig.get_path("stdlib")))]
    for package in ("torch", "numpy"):
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            folders.append((package, Path(next(iter(spec.submodule_search_locations)))))
    return folders


def _module_name(prefix: str, inner: Path) -> str:
    return ".".join(part for part in (prefix, *inner.with_suffix("").parts) if part and part != "__init__")


def _file_documents(path: Path, module: str) -> Iterator[Document]:
    """The documents of one source file, in order; none if it cannot be read or is not valid Python."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # sources for other Python versions, deliberately broken test data, odd encodings
    area = area_of(module)
    pairs = _topics(tree) if module == "pydoc_data.topics" else _docstrings(tree, module)
    for name, raw in pairs:
        text = clean(raw)
        if len(text) >= SHORTEST_DOCUMENT:
            yield Document(text, module, area, name)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference: the one dictionary literal of `pydoc_data/topics.py`."""
    for statement in tree.body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            yield from ast.literal_eval(value).items()


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of `node` and of everything defined inside it, depth first.

    Only statements are visited, never expressions: definitions are statements, and it is ten times faster.
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.For | ast.ExceptHandler):
            yield from _docstrings(child, name)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _attached_docstring(child.value, name)


def _attached_docstring(call: ast.Call, name: str) -> Iterator[tuple[str, str]]:
    """Docstrings of compiled functions: `add_docstr(torch.abs, "...")`, `add_newdoc("numpy", "abs", "...")`."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if not called.startswith(("add_docstr", "add_newdoc")):
        return
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    if strings and call.args:
        yield f"{name}.{ast.unparse(call.args[0])}", max(strings, key=len)


# --------------------------------------------------------------------------------------------- cleaning the text

_RULE = re.compile(r"^\s*([-=~^*#.+_|\s])*$")  # underlines of headings, table borders, empty lines
_STARTS_A_LINE = re.compile(r"^(>>>|\.\.\.|[-*•+] |\d+[.)] |:\w+|@\w+|\.\. |\|)")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)`'\"][.!?]) +(?=[A-Z`\"'(])")


def clean(docstring: str) -> str:
    """`docstring` with one sentence, heading, list item or line of code per line, and no blank lines.

    Paragraphs are unwrapped and split into sentences; rules made of punctuation are removed.
    """
    # Carriage returns, lone surrogates and the like occur in texts about encodings, and have no place in a corpus.
    docstring = "".join(c for c in docstring if c.isprintable() or c in "\n\t")
    paragraphs: list[str] = []
    indent = -1  # of the line before; -1: the next line starts a paragraph
    for line in inspect.cleandoc(docstring).expandtabs().split("\n"):
        if _RULE.match(line):
            indent = -1
            continue
        words = " ".join(line.split())
        own_indent = len(line) - len(line.lstrip())
        if own_indent == indent and not _STARTS_A_LINE.match(words) and not paragraphs[-1].startswith(">>>"):
            paragraphs[-1] += " " + words
        else:
            paragraphs.append(words)
        indent = own_indent
    return "\n".join(part for paragraph in paragraphs for part in _SENTENCE_END.split(paragraph))


def write_corpus(path: Path, corpus: Iterable[Document]) -> int:
    """Writes documents as `electra prepare` reads them: a sentence per line, a blank line between documents.

    Returns:
        The number of bytes written (UTF-8).
    """
    data = "\n\n".join(document.text for document in corpus).encode() + b"\n"
    Path(path).write_bytes(data)
    return len(data)


# --------------------------------------------------------------------------------------------- the labelled task

_IMPORT = re.compile(r"(>>> )?(import \w|from [\w.]+ import)")
_PATH_BEFORE_NAME = re.compile(r"~?\b(?:[A-Za-z_]\w+\.)+(?=[A-Za-z_])")  # two letters at least: "e.g." stays


def area_of(module: str) -> str:
    """The label of a module: the longest prefix in `AREAS` that it equals or lies under, or ""."""
    owner = {prefix: label for label, prefixes in AREAS.items() for prefix in prefixes}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        label = owner.get(".".join(parts[:length]))
        if label:
            return label
    return ""


def labelled_task(
    corpus: Iterable[Document],
    *,
    train_per_class: int = 64,
    dev_per_class: int = 100,
    longest: int = 400,
    seed: int = 0,
) -> LabelledTask:
    """ "Which area of the library does this docstring belong to?"

    Modules are dealt to the two sides in an order drawn from `seed`, and each contributes only a few documents,
    so that no class rests on one module's style. A class that cannot supply half of its examples is left out.

    Args:
        corpus: from `documents()`.
        train_per_class, dev_per_class: maximum number of examples of a class on each side.
        longest: maximum number of characters in an example; longer texts are cut between words.
        seed: of the split.

    Raises:
        ValueError: fewer than two classes can be filled.
    """
    modules: dict[str, dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for document in corpus:
        text = example_text(document.text, longest) if document.area else ""
        if len(text) >= SHORTEST_DOCUMENT:
            modules[document.area][document.module].append(Example(text, document.area, document))
    train: list[Example] = []
    dev: list[Example] = []
    for label in AREAS:
        own_train, own_dev = _deal(modules[label], train_per_class, dev_per_class, seed)
        if 2 * len(own_train) >= train_per_class and 2 * len(own_dev) >= dev_per_class:
            train += own_train
            dev += own_dev
    labels = list(dict.fromkeys(example.label for example in train))
    if len(labels) < 2:
        raise ValueError(f"corpus: expected documents of at least two areas of {list(AREAS)}, got {labels}")
    unseen = {example.text for example in train}
    dev = [example for example in dev if example.text not in unseen]
    return LabelledTask(_shuffled(train, seed), _shuffled(dev, seed), labels)


def example_text(text: str, longest: int) -> str:
    """A document's text as one line without the names that give its module away, at most `longest` long.

    Import lines are removed; of a dotted name only the last part is kept (`torch.nn.Linear` -> `Linear`).
    """
    line = " ".join(line for line in text.split("\n") if not _IMPORT.match(line))
    line = _PATH_BEFORE_NAME.sub("", line)
    return line if len(line) <= longest else line[: longest + 1].rpartition(" ")[0]


def _deal(
    modules: dict[str, list[Example]], train_size: int, dev_size: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Deals modules, in a drawn order, to the side further from full; documents are spread over modules."""
    sides: tuple[list[list[Example]], list[list[Example]]] = ([], [])
    filled = [0.0, 0.0]
    most = [max(1, train_size // 6), max(1, dev_size // 6)]  # of one module: a class needs at least six
    for module in sorted(modules, key=lambda module: _drawn(seed, module)):
        examples = _shuffled(modules[module], seed)
        side = 0 if filled[0] / train_size <= filled[1] / dev_size else 1
        sides[side].append(examples[: most[side]])
        filled[side] += len(sides[side][-1])
    train, dev = (_round_robin(groups) for groups in sides)
    return train[:train_size], dev[:dev_size]


def _round_robin(groups: list[list[Example]]) -> list[Example]:
    """The first of every group, then the second of every group, ..."""
    longest = max((len(group) for group in groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    return sorted(examples, key=lambda e: _drawn(seed, f"{e.document.module} {e.document.name} {e.text}"))


def _drawn(seed: int, key: str) -> bytes:
    """A sort key: a place in a random order that does not depend on what else is installed."""
    return hashlib.sha256(f"{seed} {key}".encode(errors="replace")).digest()
