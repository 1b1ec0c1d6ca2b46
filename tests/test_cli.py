"""The command line in one process: help, the whole spine on a little text, and every kind of bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_model
from small_runs import RUN, SIZES, write_text

from electra_core.cli import build_parser, main
from electra_core.tokenizer import WordPieceTokenizer

COMMANDS = tuple(build_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr, arg-type]


def flags(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


PRETRAIN = ["pretrain", "--model", "tiny", "--device", "cpu", "--quiet", *flags({**RUN, **SIZES, "steps": 4})]
FINETUNE = ["finetune", "--task", "classify", "--device", "cpu", "--quiet", "--batch-size", "8", "--epochs", "1"]


class Spine(NamedTuple):
    """What the commands made, each from what came before."""

    folder: Path
    said: dict[str, str]
    """Command -> its standard output."""


@pytest.fixture(scope="module")
def spine(tmp_path_factory: pytest.TempPathFactory) -> Spine:
    """prepare, pretrain and finetune, once for all tests."""
    folder = tmp_path_factory.mktemp("spine")
    write_text(folder / "text.txt")
    tiny_model.reviews(folder / "train.tsv", 48)
    tiny_model.reviews(folder / "dev.tsv", 16, seed=1)
    data, run, model = (str(folder / name) for name in ("data", "run", "model"))
    train, dev = str(folder / "train.tsv"), str(folder / "dev.tsv")
    prepare = ["prepare", "--text", str(folder / "text.txt"), "--out", data, "--quiet"]
    tokenizer = str(tiny_model.make_model(folder / "words") / "vocab.txt")
    assert main([*prepare, "--tokenizer", tokenizer, "--heldout-fraction", "0.1"]) == 0
    assert main([*PRETRAIN, "--data", data, "--out", run]) == 0
    assert main([*FINETUNE, "--model", run, "--train", train, "--dev", dev, "--out", model]) == 0
    return Spine(folder, {})


# Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example:" in said and f"electra {command}" in said
    undocumented = [
        action.option_strings
        for action in build_parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore
        if not action.help
    ]
    assert undocumented == []


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from electra_core.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_command_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


# The spine ----------------------------------------------------------------------------------------------------


def test_prepare_pretrain_finetune_leave_what_they_promise(spine: Spine) -> None:
    for name in ("data/manifest.json", "data/tokenizer", "run/config.toml", "run/metrics.jsonl", "run/checkpoints",
                 "run/discriminator/model.safetensors", "run/generator/config.json", "model/model.safetensors",
                 "model/config.json"):  # fmt: skip
        assert (spine.folder / name).exists(), name


def test_evaluate(spine: Spine, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--model", str(spine.folder / "model"), "--data", str(spine.folder / "dev.tsv")]
    assert main([*arguments, "--json", "--quiet", "--device", "cpu"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 <= metrics["accuracy"] <= 1


def test_predict_one_line_per_input(spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the film was great\nthe plot was awful and dull\n", encoding="utf-8")
    arguments = ["predict", "--model", str(spine.folder / "model"), "--input", str(texts), "--quiet"]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert len(lines) == 2 and all(line["label"] in ("neg", "pos") for line in lines)
    assert main([*arguments, "--output", str(tmp_path / "nowhere" / "out.jsonl")]) == 2
    (said,) = capsys.readouterr().err.strip().split("\n")
    assert "out.jsonl: cannot be written (No such file or directory)" in said


def test_texts_that_were_cut_are_counted(spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "long.tsv", "sentence\tlabel\n" + "fine " * 200 + "\tpos\nfine\tpos\n")
    for command, flag in (("predict", "--input"), ("evaluate", "--data")):
        assert main([command, "--model", str(spine.folder / "model"), flag, data, "--quiet"]) == 0
        assert "long.tsv: 1 of the inputs are longer than 32 tokens and were cut" in capsys.readouterr().err


def test_predict_writes_a_glue_submission(
    spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta great film\n1\tdull\n", encoding="utf-8")
    predict = ["predict", "--model", str(spine.folder / "model"), "--quiet", "--submission", "sst-2"]
    assert main([*predict, "--input", str(tmp_path), "--output", str(tmp_path / "glue")]) == 0
    file = tmp_path / "glue" / "SST-2.tsv"
    assert str(file) in capsys.readouterr().out and [path.name for path in file.parent.iterdir()] == [file.name]
    header, *rows = [line.split("\t") for line in file.read_text(encoding="utf-8").strip().split("\n")]
    assert header == ["index", "prediction"] and [index for index, _ in rows] == ["0", "1"]
    assert all(label in ("neg", "pos") for _, label in rows), "labels as the model was trained with"


def test_a_submission_of_another_kind_is_refused_and_of_other_labels_told(
    spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", "--model", str(spine.folder / "model"), "--quiet", "--output", str(tmp_path)]
    file = write(tmp_path / "test.tsv", "index\tsentence\n0\ta great film\n")
    assert main([*predict, "--submission", "sts-b", "--input", file]) == 2
    assert "expected a model that was fine-tuned to regress, got one for classify" in capsys.readouterr().err
    assert main([*predict, "--submission", "sst-2", "--input", file]) == 0
    assert capsys.readouterr().err == "warning: SST-2 has no label neg, pos; written as it is\n"


def test_predictions_in_a_csv_are_csv(spine: Spine, tmp_path: Path) -> None:
    file = write(tmp_path / "x.txt", "fine\n")
    predict = ["predict", "--model", str(spine.folder / "model"), "--quiet", "--input", file]
    for flags, first in (
        (["--output", "a.csv"], "i"),
        (["--output", "a.csv", "--format", "jsonl"], "{"),
        (["--output", "a.jsonl"], "{"),
    ):
        assert main([*predict, *flags[:1], str(tmp_path / flags[1]), *flags[2:]]) == 0
        assert (tmp_path / flags[1]).read_text()[0] == first


def test_detect(spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["detect", "the cat sat on the mat", "--model", str(spine.folder / "run")]
    assert main([*arguments, "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)
    assert "<html" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["run", "run/generator", "model"])
def test_info(spine: Spine, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(spine.folder / kind), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["hidden_size"], facts["num_hidden_layers"]) == (16, 1)


@pytest.mark.parametrize("model", ["small", "run"])
def test_flops(spine: Spine, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--model", model if model == "small" else str(spine.folder / model), "--json"]) == 0
    assert all(value >= 0 for value in json.loads(capsys.readouterr().out).values() if isinstance(value, float))


def test_trace(spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "trace.html"
    arguments = ["trace", "the cat sat on the mat and saw it", "--model", str(spine.folder / "run")]
    assert main([*arguments, "--html", str(page)]) == 0
    assert "[CLS]" in capsys.readouterr().out and "<html" in page.read_text(encoding="utf-8")


def test_a_text_too_long_is_cut_and_said_once(
    spine: Spine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = tiny_model.reviews(tmp_path / "train.tsv", 24)
    with train.open("a", encoding="utf-8") as file:
        file.writelines("the film was fine and " * 30 + "good\tpos\n" for _ in range(3))
    model = str(spine.folder / "run")
    caplog.set_level("INFO", "electra_core")
    assert main([*FINETUNE, "--model", model, "--train", str(train), "--out", str(tmp_path / "m")]) == 0
    said = [line for line in caplog.messages if "were cut" in line]
    assert said == ["3 of 27 examples are longer than 32 tokens and were cut"]


@pytest.mark.parametrize("name", ["t.txt", "t.md"])
@pytest.mark.parametrize("documents", [1, 2])
def test_prepare_says_what_comes_next(
    spine: Spine, tmp_path: Path, documents: int, name: str, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Pre-training, if a document is held out, as one of two is; else what to do, and exit 2."""
    caplog.set_level("INFO", "electra_core")
    text = write(tmp_path / name, "\n\n".join(["the cat sat on the mat", "a big old dog saw it"][:documents]))
    tokenizer = str(spine.folder / "data" / "tokenizer")
    out = str(tmp_path / "out")
    status = main(["prepare", "--text", text, "--out", out, "--tokenizer", tokenizer, "--quiet"])
    captured = capsys.readouterr()
    assert status == (2 if documents == 1 else 0)
    assert ("goes on from here" in captured.out) == (documents == 2)
    assert ("the text is one document" in captured.err) == (documents == 1)
    assert caplog.messages == ([f"{text}: no known suffix, read as plain text"] if name == "t.md" else [])
    assert main([*PRETRAIN, "--data", out, "--out", str(tmp_path / "run"), "--steps", "1"]) == status


# Bad input ----------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prepare_of(content: str | bytes, name: str = "t.txt", *more: str) -> Callable[[Path, Spine], list[str]]:
    def arguments(folder: Path, spine: Spine) -> list[str]:
        text = write(folder / name, content)
        return ["prepare", "--text", text, "--out", str(folder / "out"), "--quiet", "--vocab-size", "90", *more]

    return arguments


def pretrain_with(*more: str, toml: str | bytes | None = None) -> Callable[[Path, Spine], list[str]]:
    def arguments(folder: Path, spine: Spine) -> list[str]:
        config = [] if toml is None else ["--config", write(folder / "c.toml", toml)]
        return [*PRETRAIN, "--data", str(spine.folder / "data"), "--out", str(folder / "out"), *more, *config]

    return arguments


def finetune_on(content: str | bytes, *more: str, dev: str | None = None) -> Callable[[Path, Spine], list[str]]:
    def arguments(folder: Path, spine: Spine) -> list[str]:
        train = write(folder / "train.tsv", content)
        held = [] if dev is None else ["--dev", write(folder / "dev.tsv", dev)]
        model = str(spine.folder / "run")
        return [*FINETUNE, "--model", model, "--train", train, "--out", str(folder / "out"), *held, *more]

    return arguments


def occupied(folder: Path, spine: Spine) -> list[str]:
    (folder / "out").mkdir()
    write(folder / "out" / "letter.txt", "dear")
    return pretrain_with()(folder, spine)


def over_its_start(flag: str) -> Callable[[Path, Spine], list[str]]:
    """Pre-training anew in the folder of the model that it starts from."""

    def arguments(folder: Path, spine: Spine) -> list[str]:
        shutil.copytree(spine.folder / "run", folder / "out")
        pair = {"--init-discriminator": str(spine.folder / "run"), "--init-generator": str(spine.folder / "run")}
        pair[flag] = str(folder / "out" / flag.removeprefix("--init-"))
        return [*pretrain_with("--overwrite")(folder, spine), *(part for item in pair.items() for part in item)]

    return arguments


def resumed_in_a_foreign_folder(folder: Path, spine: Spine) -> list[str]:
    (folder / "out").mkdir()
    write(folder / "out" / "README.md", "mine")
    write(folder / "out" / "config.json", "{}")
    return finetune_on(REVIEWS, "--resume")(folder, spine)


def out_is_a_file(folder: Path, spine: Spine) -> list[str]:
    write(folder / "out", "a file")
    return pretrain_with()(folder, spine)


def other_tokenizer(folder: Path, spine: Spine) -> list[str]:
    """A model directory whose tokenizer has more words than the model has rows."""
    model = tiny_model.make_model(folder / "model")
    words = (model / "vocab.txt").read_text() + "more\nwords\n"
    WordPieceTokenizer.from_vocab(write(folder / "words.txt", words)).save(model)
    return ["detect", "the more words", "--model", str(model)]


def broken_weights(folder: Path, spine: Spine) -> list[str]:
    model = tiny_model.make_model(folder / "model")
    content = (model / "model.safetensors").read_bytes()
    write(model / "model.safetensors", content[: len(content) // 2])
    return ["detect", "the film", "--model", str(model)]


def changed_shards(folder: Path, spine: Spine) -> list[str]:
    shutil.copytree(spine.folder / "data", folder / "data")
    write(folder / "data" / "train-00000.tokens", b"12")
    return [*PRETRAIN, "--data", str(folder / "data"), "--out", str(folder / "out")]


LONG = "the cat sat on the mat\n" * 50
REVIEWS = "sentence\tlabel\n" + "a fine film\tpos\na dull film\tneg\n" * 8

BAD: dict[str, tuple[Callable[[Path, Spine], list[str]], str]] = {
    "prepare: missing": (lambda f, s: ["prepare", "--text", str(f / "no.txt"), "--out", str(f / "out")], "no.txt"),
    "prepare: empty": (prepare_of(""), "text"),
    "prepare: binary": (prepare_of(b"\x00\x01\x02\xff" * 400), r"t\.txt"),
    "prepare: invalid UTF-8": (prepare_of(b"good text\nbad \xff text\n"), r"t\.txt.*14"),
    "prepare: truncated gz": (prepare_of(b"\x1f\x8b\x08\x00rubbish", "t.txt.gz"), r"t\.txt\.gz"),
    "prepare: not JSON": (prepare_of('{"text": "a"}\n{"text": \n', "t.jsonl"), r"t\.jsonl.*2"),
    "prepare: no such field": (prepare_of('{"body": "a"}\n', "t.jsonl"), "text"),
    "prepare: corpus too small": (prepare_of("one two\n", "t.txt", "--vocab-size", "5000"), "5,?000"),
    "prepare: no such tokenizer": (prepare_of(LONG, "t.txt", "--tokenizer", "no/such"), "no/such"),
    "prepare: a corpus for a tokenizer": (
        lambda f, s: ["prepare", "--text", write(f / "t.txt", LONG), "--out", str(f / "out"), "--tokenizer",
                      str(s.folder / "data")], "data/tokenizer may be meant",
    ),
    "prepare: held-out share": (prepare_of(LONG, "t.txt", "--heldout-fraction", "1.5"), "heldout"),
    "prepare: no worker": (prepare_of(LONG, "t.txt", "--workers", "0"), "--workers: expected at least 1, got 0"),
    "prepare: seed below 0": (prepare_of(LONG, "t.txt", "--seed", "-1"), "--seed: expected .* got -1"),
    "prepare: no vocabulary": (prepare_of(LONG, "t.txt", "--vocab-size", "0"), "--vocab-size: expected"),
    "prepare: cased, with a tokenizer": (
        prepare_of(LONG, "t.txt", "--cased", "--tokenizer", "words"),
        "--vocab-size, --cased: no effect .* --tokenizer words",
    ),
    "prepare: a kind not read": (prepare_of(b"%PDF-1.4", "t.pdf"), r"t\.pdf: \.pdf is not read; save its text as"),
    "prepare: no such column": (prepare_of("id,body\n1,x\n", "t.csv"), "no column 'text'.* are 'id', 'body'"),
    "pretrain: no corpus": (lambda f, s: [*PRETRAIN, "--data", str(f), "--out", str(f / "out")], "not a prepared"),
    "pretrain: damaged corpus": (changed_shards, "train-00000.tokens"),
    "pretrain: unknown key": (pretrain_with(toml="lerning_rate = 1e-3\n"), r"lerning_rate.*learning_rate"),
    "pretrain: unknown encoder key": (pretrain_with(toml="[discriminator]\nhiden_size = 4\n"), "hidden_size"),
    "pretrain: wrong type": (pretrain_with(toml='clip_norm = "much"\n'), "clip_norm expects .* float"),
    "pretrain: not TOML": (pretrain_with(toml="steps = = 3\n"), r"c\.toml"),
    "pretrain: config not UTF-8": (pretrain_with(toml=b"model = '\xff'\n"), r"c\.toml"),
    "pretrain: config missing": (pretrain_with("--config", "no.toml"), r"no\.toml"),
    "pretrain: unknown choice": (pretrain_with("--objective", "elektra"), "electra"),
    "pretrain: too long": (pretrain_with("--max-length", "64"), "64.* 32 positions"),
    "pretrain: uneven parts": (pretrain_with("--accumulate", "3"), "accumulate 3"),
    "pretrain: no such device": (pretrain_with("--device", "tpu"), "tpu"),
    "pretrain: a device not known": (pretrain_with("--device", "mps"), "--device mps: expected auto, cpu or cuda"),
    "pretrain: dropout": (pretrain_with("--hidden-dropout-prob", "1.5"), "hidden_dropout_prob: .* got 1.5"),
    "pretrain: one segment": (pretrain_with("--type-vocab-size", "1"), "type_vocab_size: expected at least 2.* 1"),
    "pretrain: generator's heads": (
        pretrain_with("--generator-attention-heads", "3"), "generator_attention_heads: expected .* got 3",
    ),
    "pretrain: time limit": (pretrain_with("--max-minutes", "-1"), "--max-minutes: expected .* got -1"),
    "pretrain: over its discriminator": (over_its_start("--init-discriminator"), "holds the model to start from"),
    "pretrain: over its generator": (over_its_start("--init-generator"), "holds the model to start from"),
    "pretrain: occupied folder": (occupied, "not empty.*--resume.*--overwrite"),
    "pretrain: one network of two sizes": (
        pretrain_with("--tying", "all", "--generator-layers", "7"),
        "tying: all expects .* num_hidden_layers 7 for 1",
    ),
    "pretrain: half a pair": (pretrain_with("--init-generator", "x"), "go together"),
    "finetune: missing": (lambda f, s: [*finetune_on(REVIEWS)(f, s), "--train", str(f / "no.tsv")], r"no\.tsv"),
    "finetune: empty": (finetune_on(""), r"train\.tsv"),
    "finetune: binary": (finetune_on(b"\x00\x01\xff\xfe" * 99), r"train\.tsv"),
    "finetune: invalid UTF-8": (finetune_on(REVIEWS.encode() + b"caf\xe9\tpos\n"), r"train\.tsv"),
    "finetune: missing column": (finetune_on(REVIEWS, "--text-column", "review"), "review.*sentence.*label"),
    "finetune: unseen label": (finetune_on(REVIEWS, dev="sentence\tlabel\na film\tmixed\n"), "mixed"),
    "finetune: one class": (finetune_on("sentence\tlabel\nfine\tpos\nbad\tpos\n"), r"train\.tsv: every .* 'pos'"),
    "finetune: resumed in a foreign folder": (resumed_in_a_foreign_folder, "not empty and holds no run to resume"),
    "finetune: more layers to freeze than there are": (finetune_on(REVIEWS, "--freeze", "9"), "1 layers, got 9"),
    "finetune: no such model": (finetune_on(REVIEWS, "--model", "no/such/model"), "no/such/model"),
    "finetune: unknown task": (finetune_on(REVIEWS, "--task", "clasify"), "clasify"),
    "evaluate: no model": (lambda f, s: ["evaluate", "--model", str(f / "m"), "--data", "x.tsv"], "/m"),
    "evaluate: missing data": (
        lambda f, s: ["evaluate", "--model", str(s.folder / "model"), "--data", str(f / "x.tsv")], r"x\.tsv",
    ),
    "evaluate: not fine-tuned": (
        lambda f, s: ["evaluate", "--model", str(s.folder / "run"), "--data", str(s.folder / "dev.tsv")], "run",
    ),
    "predict: missing input": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", str(f / "x.txt")], r"x\.txt",
    ),
    "predict: missing input, output full": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", str(f / "x.txt"),
                      "--output", write(f / "out.jsonl", "of last week\n")], r"x\.txt",
    ),
    "predict: input of no use, output full": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", write(f / "x.csv", "a,b\n1,2\n"),
                      "--output", write(f / "out.jsonl", "of last week\n")], r"x\.csv",
    ),
    "predict: a submission for no GLUE task": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", str(s.folder / "dev.tsv"),
                      "--submission", "squad"], "no GLUE submission",
    ),
    "evaluate: a report of no kind": (
        lambda f, s: ["evaluate", "--model", "none", "--data", "x.tsv", "--report", "r.pdf"], "got .pdf",
    ),
    "evaluate: a report in no folder": (
        lambda f, s: ["evaluate", "--model", "none", "--data", "x.tsv", "--report", "no/r.html"], "no folder no",
    ),
    "predict: over its input": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--output", "./x.txt"], "is the input, which would be lost",
    ),
    "predict: a submission with a bad row": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--submission", "sst-2", "--input",
                      write(f / "x.tsv", "index\tsentence\n0\tfine\n1\t \n")], r"x.tsv:3: the text is empty",
    ),
    "predict: a submission into a file": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--submission", "sst-2", "--input",
                      write(f / "x.tsv", "sentence\nfine\n"), "--output", str(f / "x.tsv")], "cannot be written",
    ),
    "export: another suffix": (
        lambda f, s: ["export", "--model", str(s.folder / "model"), "--onnx", "model"], "ends in .onnx",
    ),
    "predict: a submission with rows left out": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", str(s.folder / "dev.tsv"),
                      "--submission", "rte", "--skip-bad-rows"], "every row needs an answer",
    ),
    "detect: empty text": (lambda f, s: ["detect", "  ", "--model", str(s.folder / "run")], "text is empty"),
    "detect: fine-tuned": (
        lambda f, s: ["detect", "a film", "--model", str(s.folder / "model")],
        "holds ElectraForSequenceClassification, not ElectraForPreTraining",
    ),
    "predict: a text column of plain lines": (
        lambda f, s: ["predict", "--model", str(s.folder / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--text-column", "review"], "no text column 'review'",
    ),
    "detect: another tokenizer": (other_tokenizer, "vocab|shape"),
    "detect: broken weights": (broken_weights, "model.safetensors"),
    "info: not a model": (lambda f, s: ["info", "--model", str(f)], "config.json"),
    "flops: no such preset": (lambda f, s: ["flops", "--model", "huge"], "huge"),
    "convert: missing": (lambda f, s: ["convert", "--tf", str(f / "no"), "--out", str(f / "out")], "no"),
}  # fmt: skip


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, spine: Spine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 2, one clear line that names the trouble, nothing half-written, nothing lost."""
    make, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    arguments = make(tmp_path, spine)
    before = listing(tmp_path)
    capsys.readouterr()
    status = main(arguments)
    complaint = capsys.readouterr().err.strip().split("\n")
    assert status == 2
    ours = [line for line in complaint if line.startswith("electra ")]
    assert len(ours) == 1, complaint
    assert complaint[-1] == ours[0], "nothing behind it"
    assert re.search(said, ours[0]), ours[0]
    assert listing(tmp_path) == before
