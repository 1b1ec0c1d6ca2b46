"""README and docs/ say what is so: every block and command runs, every link and included function exists.

`electra` commands run in this process, in a small workspace with the names that the pages use (books/, DATA, RUN,
SST-2/, ...), with SMALL's settings added. Of `make` and `python` commands it is checked that target, module or
file exist. A block marked `<!-- not run here: why -->` is only checked like that, and its flags are.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import lzma
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS, ROOT, Block, blocks

from electra_core import cli
from electra_core.config import OWN_OBJECTIVES
from electra_core.downstream.task_files import KINDS
from electra_core.encoder import Encoder, Layer
from electra_core.objectives import _own

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
hooks = runpy.run_path(str(DOCS / "site" / "hooks.py"))

SMALL = {
    "prepare": "--vocab-size 400 --heldout-fraction 0.1 --overwrite --quiet",
    "convert": "",
    "pretrain": "--steps 2 --batch-size 2 --max-length 32 --num-hidden-layers 1 --generator-layers 1 "
    "--eval-examples 2 --quiet",
    "finetune": "--epochs 1 --max-length 16 --overwrite --quiet",
    "evaluate": "--quiet",
    "predict": "--quiet",
    "trace": "",
    "detect": "",
    "flops": "",
    "info": "",
}
"""Commands that run here, and what makes them small. Others are checked by their flags."""
SMALL_MEMORY = "--model tiny --batch 2 --length 16"
"""The same for `info --memory`, which traces a step of a preset."""
MEASURED = (
    "results",
    "decisions",
    "tiny_history",
    "benchmarks",
    "performance",
    "reliability",
    "scaling",
    "kernels",
    "worked_example",
)
"""Pages whose commands made their figures, with hours of work and other people's data: checked by their flags."""


def shell_commands(block: Block) -> list[str]:
    """The commands of a block; none if it shows something else."""
    if block.language not in ("", "sh", "bash", "console", "shell"):
        return []
    text = re.sub(r"\\\n\s*", "", block.text)
    return [line.removeprefix("$ ").strip() for line in text.split("\n") if line.startswith(STARTS)]


STARTS = ("electra ", "python ", "make ", "echo ", "torchrun ", "srun ", "OMP_NUM_THREADS=", "pip ", "$ ")


def indented_commands(page: Path) -> list[str]:
    """Commands of the blocks without a fence, which made a page's figures; what may be left out is in brackets."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line[4:] for line in re.sub(r"\\\n\s*", "", text).split("\n") if line.startswith("    ")]
    return [re.sub(r" \(.*|[][]", "", line) for line in lines if line.startswith(STARTS)]


def prose(page: Path) -> str:
    """The page without its blocks and its inline code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


# Links and included functions ---------------------------------------------------------------------------------


def slug(heading: str) -> str:
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def headings(page: Path) -> set[str]:
    return {slug(line.lstrip("# ")) for line in prose(page).split("\n") if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{link}: no such heading; there are {sorted(headings(target))}"
        elif anchor and target.suffix == ".py":
            hooks["source_of"](target, anchor)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_included_functions_exist(page: Path) -> None:
    for _, link, name in hooks["INCLUDE"].findall(page.read_text(encoding="utf-8")):
        source = hooks["source_of"](hooks["resolve"](link), name)
        compile(source.text, link, "exec")
        assert name.split(".")[-1] in source.text and source.first_line > 0


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_lists_and_tables_begin_after_a_blank_line(page: Path) -> None:
    """Otherwise the site makes them one paragraph with the line before, though GitHub does not."""
    lines = prose(page).split("\n")
    for before, line in itertools.pairwise(lines):
        if re.match(r"- |\d+\. |\|", line):
            assert not before or re.match(r"- |\d+\. |\||#|  |<!--", before), f"{before}\n{line}"


def test_a_function_that_is_gone_is_noticed() -> None:
    with pytest.raises(LookupError, match=r"masking\.py has no mask_everything"):
        hooks["source_of"](ROOT / "electra_core" / "masking.py", "mask_everything")


def test_docstrings_are_left_out_and_methods_found() -> None:
    text = hooks["source_of"](ROOT / "electra_core" / "electra.py", "Electra.forward").text
    assert text.startswith("def forward(") and '"""' not in text and "replace_tokens(" in text


def test_names_on_the_reference_page_exist() -> None:
    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f": {page.name}\n" not in navigation + "\n"]
    assert not missing, f"docs/site/mkdocs.yml: {missing} in no menu"


def test_the_navigation_has_the_order_that_the_start_page_proposes() -> None:
    """Of the pages to understand the algorithm by, and of those about kernels."""
    start = (DOCS / "index.md").read_text(encoding="utf-8")
    navigation = re.findall(
        r": (\w+\.md)$", (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    for part in ("I want to understand it", "I want to know what makes"):
        steps = start.partition(part)[2].partition("###")[0]
        linked = dict.fromkeys(re.findall(r"\]\((\w+\.md)\)", steps))
        places = [navigation.index(page) for page in linked if page not in ("exercises.md", "decisions.md")]
        assert len(places) >= 4 and places == sorted(places), f"{part}: {list(linked)}"


# Blocks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of: text, a corpus, a run, labelled data."""
    folder = tmp_path_factory.mktemp("pages")
    text = "\n\n".join(prose(page) for page in sorted(DOCS.glob("*.md"))).encode("ascii", "ignore").decode()
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text(text)
    (folder / "wiki.txt.xz").write_bytes(lzma.compress(text[:20000].encode()))
    (folder / "SST-2").mkdir()
    rows = [("a warm and funny film", 1), ("dull and slow", 0), ("engaging", 1), ("a waste of time", 0)] * 4
    for name in ("train", "dev"):
        lines = "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
        (folder / "SST-2" / f"{name}.tsv").write_text(f"sentence\tlabel\n{lines}")
    (folder / "SST-2" / "test.tsv").write_text("index\tsentence\n0\ta warm film\n1\tdull\n")
    pairs = "".join(
        f"a man walks\ta {who} walks\t{label}\n" for who, label in [("person", "yes"), ("cat", "no")] * 8
    )
    (folder / "pairs.tsv").write_text(f"premise\thypothesis\tlabel\n{pairs}")
    comments = "".join(f"{n},{'you fool' if n % 2 else 'thank you'} {n},{n % 2},{n % 2},0\n" for n in range(16))
    (folder / "comments.csv").write_text(f"id,comment_text,toxic,insult,threat\n{comments}")
    posts = [{"text": f"thank you {n}", "labels": [["joy"], ["joy", "thanks"], []][n % 3]} for n in range(16)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    (folder / "texts.txt").write_text("a warm film\ndull\n")
    said = [("no connection, what now?", "internet"), ("the bill is wrong", "money")] * 10
    tickets = [f'T{n},"{text}\n({n})",{topic},north\n' for n, (text, topic) in enumerate(said)]
    for name, lines in {"tickets": tickets, "tested": tickets[:4], "new": [*tickets[:3], "T9,,,south\n"]}.items():
        table = f"ticket,text,topic,team\n{''.join(lines)}"
        (folder / f"{name}.csv").write_text(table, encoding="utf-8-sig")
    (folder / "sample" / "task").mkdir(parents=True)  # as `electra demo --texts-only` makes it, but small
    (folder / "sample" / "corpus.txt").write_text(text)
    examples = [("the mean of an array", "arrays"), ("connect to a server", "internet")] * 8
    for name in ("train", "dev"):
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in examples)
        (folder / "sample" / "task" / f"{name}.jsonl").write_text(lines)
    shutil.copytree(ROOT / "electra_core" / "tiny", folder / "electra_core" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(shlex.split(f"prepare --text books --out DATA {SMALL['prepare']}")) == 0
        small = f"{SMALL['pretrain']} --hidden-size 64 --intermediate-size 64"
        assert cli.main(shlex.split(f"pretrain --data DATA --out RUN --model small {small}")) == 0
    return folder


@pytest.fixture
def own_classes() -> Iterator[None]:
    """Takes back the classes that a page sets, and the tasks and objectives that it registers."""
    attention, layer = Layer.attention_class, Encoder.layer_class
    kinds, objectives, names = dict(KINDS), dict(_own), list(OWN_OBJECTIVES)
    yield
    Layer.attention_class, Encoder.layer_class = attention, layer
    for registered, before in ((KINDS, kinds), (_own, objectives)):
        registered.clear()
        registered.update(before)
    OWN_OBJECTIVES[:] = names


@pytest.mark.usefixtures("own_classes")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(
    page: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page, one after the other, in a folder of their own."""
    found = [block for block in blocks(page) if block.language == "python" or shell_commands(block)]
    if not found:
        return
    work = tmp_path / "work"
    shutil.copytree(base, work)
    monkeypatch.chdir(work)
    namespace: dict[str, object] = {"__name__": "__page__"}
    only_flags = page.stem in MEASURED
    for block in found:
        if block.language == "python":
            if not block.reason:
                exec(compile(block.text, f"{page.name}:{block.line}", "exec", dont_inherit=True), namespace)
            continue
        for command in shell_commands(block):
            try:
                run(command, monkeypatch, only_flags or bool(block.reason))
            except (Exception, SystemExit) as error:
                told = capsys.readouterr().err[-500:]
                raise AssertionError(f"{page.name}, line {block.line}: {command}: {error!r}\n{told}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_without_a_fence_have_flags_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in indented_commands(page):
        run(command, monkeypatch, only_flags=True)


def block_of_service(needs: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names after the block of service.md that needs a library, with the page's model."""
    page = list(blocks(DOCS / "service.md"))
    (block,) = (block for block in page if block.reason == f"needs {needs}")
    training = next(c for b in page for c in shell_commands(b) if c.startswith("electra finetune "))
    run(training, monkeypatch, only_flags=False)
    namespace: dict[str, Any] = {}
    exec(compile(block.text, f"service.md:{block.line}", "exec"), namespace)
    return namespace


@pytest.fixture
def work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own with what `base` holds, which is the current one."""
    shutil.copytree(base, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.usefixtures("work")
def test_the_block_with_pandas_runs_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    table = block_of_service("pandas", monkeypatch)["table"]
    assert {*table["topic"]} <= {"internet", "money"} and len(table) == 3


@pytest.mark.usefixtures("work")
def test_the_server_runs_where_fastapi_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    client_of = pytest.importorskip("fastapi.testclient").TestClient
    namespace = block_of_service("fastapi", monkeypatch)
    client = client_of(namespace["app"])
    assert client.post("/topics", json={"texts": ["no connection"]}).json()[0]["topic"] in ("internet", "money")
    for bad in ("", "a \ud800"):
        body, kind = json.dumps({"texts": ["fine", bad]}), {"content-type": "application/json"}
        answer = client.post("/topics", content=body, headers=kind)
        assert answer.status_code == 422 and answer.json()["detail"].startswith("inputs[1]: "), answer.text


def run(command: str, monkeypatch: pytest.MonkeyPatch, only_flags: bool) -> None:
    """Runs one command, or checks what can be checked of it."""
    if command.startswith("echo "):
        text, _, command = command.partition(" | ")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(shlex.split(text)[1].encode() + b"\n")))
    words = [word for word in shlex.split(command, comments=True) if word not in ("&", "nohup")]
    words = words[: words.index(">")] if ">" in words else words
    words = list(itertools.dropwhile(lambda word: word == "srun" or re.match(r"\w+=", word), words))
    if not words or any("..." in word or "…" in word for word in words):
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    elif words[0] == "python":
        check_python(words[1:])
    elif words[0] == "torchrun":
        run_electra(words[words.index("electra_core") + 1 :], only_flags=True)
    elif words[0] == "electra":
        run_electra(words[1:], only_flags)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found is not None, f"no module {words[1]}"
        if words[1].startswith("benchmarks."):  # read, not run: their imports take seconds
            known = re.findall(r'"(--[\w-]+)"', Path(str(found.origin)).read_text(encoding="utf-8"))
            assert {word for word in words if word.startswith("--")} <= {*known}, f"{words[1]}: flags are {known}"
    elif words[0] != "-c":
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


def run_electra(words: list[str], only_flags: bool) -> None:
    if only_flags or words[0] not in SMALL:
        cli.build_parser().parse_args(words)
        return
    fresh = ["--overwrite"] if words[0] == "pretrain" and "--resume" not in words else []
    small = SMALL_MEMORY if "--memory" in words else SMALL[words[0]]
    status = cli.main([*words, *shlex.split(small), *fresh])
    assert status == 0, f"exit status {status}"


def test_wrong_blocks_are_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves can fail."""
    monkeypatch.chdir(base)
    for wrong in ("electra pretrain --data DATA --out X --batchsize 2", "electra trance x", "make nothing",
                  "python -m benchmarks.nothing", "python docs/nothing.py",
                  "python -m benchmarks.bench_step --batches 2",
                  "srun torchrun -m electra_core pretrain --data DATA --out X --batchsize 2"):  # fmt: skip
        for only_flags in (True, False):
            with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
                run(wrong, monkeypatch, only_flags)


# Figures --------------------------------------------------------------------------------------------------------

FIGURES = sorted(path for path in (DOCS / "figures").glob("*.py") if path.stem != "style")


@pytest.mark.parametrize("script", FIGURES, ids=lambda path: path.stem)
def test_figures_are_drawn(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script runs, and its words and colours are those of the committed figure."""
    if "axes" in script.read_text(encoding="utf-8"):
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    drawn = (tmp_path / f"{script.stem}.svg").read_text(encoding="utf-8")
    committed = script.with_suffix(".svg").read_text(encoding="utf-8")
    words = [re.findall(r"<text[^>]*>([^<]+)", text) for text in (drawn, committed)]
    assert words[0] == words[1], "draw it again and commit the result"
    for text in (drawn, committed):
        assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
        assert "url(http" not in text and 'href="http' not in text and "#0a0b" not in text


def test_an_answer_on_a_strong_shade_is_not_of_the_shades_colour() -> None:
    drawn = (DOCS / "figures" / "masked_sentence.svg").read_text(encoding="utf-8")
    shaded = re.findall(r'fill-opacity: ([\d.]+)"/><text [^>]*style="fill: var\(--(\w+)\)', drawn)
    strong = {tone for opacity, tone in shaded if float(opacity) > 0.5}
    assert len(shaded) > 10 and strong == {"ink"}


def test_curve_of_the_figure_is_the_shipped_one() -> None:
    rows = (ROOT / "electra_core" / "tiny" / "curve.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert json.loads(rows[-1])["step"] >= 1000 and {"eval_rtd_auc", "eval_mlm_loss"} <= set(json.loads(rows[0]))
