"""The command line and bad input: a line that names the trouble, and nothing is left or lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_model
from spine_run import FINETUNE, PRETRAIN, spine, write  # noqa: F401

from electra_core.cli import main
from electra_core.tokenizer import WordPieceTokenizer


def prepare_of(content: str | bytes, name: str = "t.txt", *more: str) -> Callable[[Path, Path], list[str]]:
    def arguments(folder: Path, spine: Path) -> list[str]:
        text = write(folder / name, content)
        return ["prepare", "--text", text, "--out", str(folder / "out"), "--quiet", "--vocab-size", "90", *more]

    return arguments


def pretrain_with(*more: str, toml: str | bytes | None = None) -> Callable[[Path, Path], list[str]]:
    def arguments(folder: Path, spine: Path) -> list[str]:
        config = [] if toml is None else ["--config", write(folder / "c.toml", toml)]
        return [*PRETRAIN, "--data", str(spine / "data"), "--out", str(folder / "out"), *more, *config]

    return arguments


def finetune_on(content: str | bytes, *more: str, dev: str | None = None) -> Callable[[Path, Path], list[str]]:
    def arguments(folder: Path, spine: Path) -> list[str]:
        train = write(folder / "train.tsv", content)
        held = [] if dev is None else ["--dev", write(folder / "dev.tsv", dev)]
        model = str(spine / "run")
        return [*FINETUNE, "--model", model, "--train", train, "--out", str(folder / "out"), *held, *more]

    return arguments


def occupied(folder: Path, spine: Path) -> list[str]:
    (folder / "out").mkdir()
    write(folder / "out" / "letter.txt", "dear")
    return pretrain_with()(folder, spine)


def over_its_start(flag: str) -> Callable[[Path, Path], list[str]]:
    """Pre-training anew in the folder of the model that it starts from."""

    def arguments(folder: Path, spine: Path) -> list[str]:
        shutil.copytree(spine / "run", folder / "out")
        pair = {"--init-discriminator": str(spine / "run"), "--init-generator": str(spine / "run")}
        pair[flag] = str(folder / "out" / flag.removeprefix("--init-"))
        return [*pretrain_with("--overwrite")(folder, spine), *(part for item in pair.items() for part in item)]

    return arguments


def resumed_in_a_foreign_folder(folder: Path, spine: Path) -> list[str]:
    (folder / "out").mkdir()
    write(folder / "out" / "README.md", "mine")
    write(folder / "out" / "config.json", "{}")
    return finetune_on(REVIEWS, "--resume")(folder, spine)


def out_is_a_file(folder: Path, spine: Path) -> list[str]:
    write(folder / "out", "a file")
    return pretrain_with()(folder, spine)


def other_tokenizer(folder: Path, spine: Path) -> list[str]:
    """A model directory whose tokenizer has more words than the model has rows."""
    model = tiny_model.make_model(folder / "model")
    words = (model / "vocab.txt").read_text() + "more\nwords\n"
    WordPieceTokenizer.from_vocab(write(folder / "words.txt", words)).save(model)
    return ["detect", "the more words", "--model", str(model)]


def broken_weights(folder: Path, spine: Path) -> list[str]:
    model = tiny_model.make_model(folder / "model")
    content = (model / "model.safetensors").read_bytes()
    write(model / "model.safetensors", content[: len(content) // 2])
    return ["detect", "the film", "--model", str(model)]


def changed_shards(folder: Path, spine: Path) -> list[str]:
    shutil.copytree(spine / "data", folder / "data")
    write(folder / "data" / "train-00000.tokens", b"12")
    return [*PRETRAIN, "--data", str(folder / "data"), "--out", str(folder / "out")]


LONG = "the cat sat on the mat\n" * 50
REVIEWS = "sentence\tlabel\n" + "a fine film\tpos\na dull film\tneg\n" * 8

BAD: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
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
                      str(s / "data")], "data/tokenizer may be meant",
    ),
    "prepare: held-out share": (prepare_of(LONG, "t.txt", "--heldout-fraction", "1.5"), "heldout"),
    "prepare: no worker": (prepare_of(LONG, "t.txt", "--workers", "0"), "--workers: expected at least 1, got 0"),
    "prepare: seed below 0": (prepare_of(LONG, "t.txt", "--seed", "-1"), "--seed: expected .* got -1"),
    "prepare: no vocabulary": (prepare_of(LONG, "t.txt", "--vocab-size", "0"), "--vocab-size: expected"),
    "prepare: cased, with a tokenizer": (
        prepare_of(LONG, "t.txt", "--cased", "--tokenizer", "words"),
        "--vocab-size, --cased: no effect .* --tokenizer words",
    ),
    "prepare: a kind not read": (
        prepare_of(b"%PDF-1.4", "t.pdf"), r"t\.pdf: \.pdf files cannot be read; save its text as",
    ),
    "prepare: no such column": (prepare_of("id,body\n1,x\n", "t.csv"), "no column 'text'.* are 'id', 'body'"),
    "pretrain: no corpus": (lambda f, s: [*PRETRAIN, "--data", str(f), "--out", str(f / "out")], "not a prepared"),
    "pretrain: damaged corpus": (changed_shards, "train-00000.tokens"),
    "pretrain: unknown key": (pretrain_with(toml="lerning_rate = 1e-3\n"), r"lerning_rate.*learning_rate"),
    "pretrain: unknown encoder key": (pretrain_with(toml="[discriminator]\nhiden_size = 4\n"), "hidden_size"),
    "pretrain: wrong type": (pretrain_with(toml='clip_norm = "much"\n'), "clip_norm: expected .* float"),
    "pretrain: not TOML": (pretrain_with(toml="steps = = 3\n"), r"c\.toml"),
    "pretrain: config not UTF-8": (pretrain_with(toml=b"model = '\xff'\n"), r"c\.toml"),
    "pretrain: config missing": (pretrain_with("--config", "no.toml"), r"no\.toml: cannot be read \(No such file"),
    "pretrain: unknown choice": (pretrain_with("--objective", "elektra"), "electra"),
    "pretrain: too long": (pretrain_with("--max-length", "64"), "64.* 32 positions"),
    "pretrain: uneven parts": (pretrain_with("--accumulate", "3"), "accumulate 3"),
    "pretrain: no such device": (pretrain_with("--device", "tpu"), "tpu"),
    "pretrain: a device not known": (pretrain_with("--device", "mps"), "device mps: expected auto, cpu or cuda"),
    "pretrain: dropout": (pretrain_with("--hidden-dropout-prob", "1.5"), "hidden_dropout_prob: .* got 1.5"),
    "pretrain: one segment": (pretrain_with("--type-vocab-size", "1"), "type_vocab_size: expected at least 2.* 1"),
    "pretrain: a share": (
        pretrain_with("--one-segment-probability", "1.5"), "one_segment_probability: .* from 0 to 1, got 1.5",
    ),
    "pretrain: generator's heads": (
        pretrain_with("--generator-attention-heads", "3"), "generator_attention_heads: expected .* got 3",
    ),
    "pretrain: time limit": (pretrain_with("--max-minutes", "-1"), "--max-minutes: expected .* got -1"),
    "pretrain: time of stopping": (pretrain_with("--stop-at", "600"), "--stop-at: expected a time .* got 600"),
    "pretrain: time without a job's end": (pretrain_with("--stop-at=-600"), "--stop-at: expected .* got -600"),
    "pretrain: a day long ago": (
        pretrain_with("--stop-at", "2020-01-01T18:00"), "--stop-at: expected a time .* got '2020-01-01T18:00'",
    ),
    "pretrain: milliseconds": (
        pretrain_with("--stop-at", "1900000000000"), "--stop-at: .* within ten years, got 19.* .in seconds",
    ),
    "pretrain: never": (pretrain_with("--stop-at", "inf"), "--stop-at: .* within ten years, got inf"),
    "pretrain: no time": (pretrain_with("--stop-at", "noon"), "--stop-at: expected seconds.*18:00, got 'noon'"),
    "pretrain: over its discriminator": (over_its_start("--init-discriminator"), "holds the model to start from"),
    "pretrain: over its generator": (over_its_start("--init-generator"), "holds the model to start from"),
    "pretrain: occupied folder": (occupied, "not empty.*--resume.*--overwrite"),
    "pretrain: one network of two sizes": (
        pretrain_with("--tying", "all", "--generator-layers", "7"),
        "tying: 'all' needs .* num_hidden_layers 7 for 1",
    ),
    "pretrain: half a pair": (pretrain_with("--init-generator", "x"), "give both or neither"),
    "finetune: missing": (lambda f, s: [*finetune_on(REVIEWS)(f, s), "--train", str(f / "no.tsv")], r"no\.tsv"),
    "finetune: empty": (finetune_on(""), r"train\.tsv"),
    "finetune: binary": (finetune_on(b"\x00\x01\xff\xfe" * 99), r"train\.tsv"),
    "finetune: invalid UTF-8": (finetune_on(REVIEWS.encode() + b"caf\xe9\tpos\n"), r"train\.tsv"),
    "finetune: missing column": (finetune_on(REVIEWS, "--text-column", "review"), "review.*sentence.*label"),
    "finetune: unseen label": (finetune_on(REVIEWS, dev="sentence\tlabel\na film\tmixed\n"), "mixed"),
    "finetune: one class": (finetune_on("sentence\tlabel\nfine\tpos\nbad\tpos\n"), r"train\.tsv: every .* 'pos'"),
    "finetune: resumed in a foreign folder": (
        resumed_in_a_foreign_folder, "not empty, but holds no run to resume",
    ),
    "finetune: more layers to freeze than there are": (finetune_on(REVIEWS, "--freeze", "9"), "1 layers, got 9"),
    "finetune: no such model": (finetune_on(REVIEWS, "--model", "no/such/model"), "no/such/model"),
    "finetune: unknown task": (finetune_on(REVIEWS, "--task", "clasify"), "clasify"),
    "evaluate: no model": (lambda f, s: ["evaluate", "--model", str(f / "m"), "--data", "x.tsv"], "/m"),
    "evaluate: missing data": (
        lambda f, s: ["evaluate", "--model", str(s / "model"), "--data", str(f / "x.tsv")], r"x\.tsv",
    ),
    "evaluate: not fine-tuned": (
        lambda f, s: ["evaluate", "--model", str(s / "run"), "--data", str(s / "dev.tsv")], "run",
    ),
    "predict: missing input": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", str(f / "x.txt")], r"x\.txt",
    ),
    "predict: missing input, output full": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", str(f / "x.txt"),
                      "--output", write(f / "out.jsonl", "of last week\n")], r"x\.txt",
    ),
    "predict: input of no use, output full": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", write(f / "x.csv", "a,b\n1,2\n"),
                      "--output", write(f / "out.jsonl", "of last week\n")], r"x\.csv",
    ),
    "predict: a submission for no GLUE task": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", str(s / "dev.tsv"),
                      "--submission", "squad"], "--submission: expected one of",
    ),
    "evaluate: a report of no kind": (
        lambda f, s: ["evaluate", "--model", "none", "--data", "x.tsv", "--report", "r.pdf"], "got .pdf",
    ),
    "evaluate: a report in no folder": (
        lambda f, s: ["evaluate", "--model", "none", "--data", "x.tsv", "--report", "no/r.html"], "no folder no",
    ),
    "predict: over its input": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--output", "./x.txt"], "is also the input and would overwrite it; name another",
    ),
    "predict: into a table that is not written": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--output", str(f / "x.xlsx")],
        r"x\.xlsx: expected a name that ends in \.jsonl or \.csv, or --format; got \.xlsx",
    ),
    "predict: into a compressed file": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--output", str(f / "x.csv.gz")], r"ends in \.jsonl or \.csv, or --format; got \.gz",
    ),
    "predict: a submission with a bad row": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--submission", "sst-2", "--input",
                      write(f / "x.tsv", "index\tsentence\n0\tfine\n1\t \n")], r"x.tsv:3: the text is empty",
    ),
    "predict: a submission into a file": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--submission", "sst-2", "--input",
                      write(f / "x.tsv", "sentence\nfine\n"), "--output", str(f / "x.tsv")], "cannot be written",
    ),
    "export: another suffix": (
        lambda f, s: ["export", "--model", str(s / "model"), "--onnx", "model"], "ends in .onnx",
    ),
    "predict: a submission with rows left out": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", str(s / "dev.tsv"),
                      "--submission", "rte", "--skip-bad-rows"], "every row needs an answer",
    ),
    "detect: empty text": (lambda f, s: ["detect", "  ", "--model", str(s / "run")], "text is empty"),
    "detect: fine-tuned": (
        lambda f, s: ["detect", "a film", "--model", str(s / "model")],
        "holds ElectraForSequenceClassification, not ElectraForPreTraining",
    ),
    "predict: a text column of plain lines": (
        lambda f, s: ["predict", "--model", str(s / "model"), "--input", write(f / "x.txt", "fine\n"),
                      "--text-column", "review"], "no text column 'review'",
    ),
    "detect: another tokenizer": (other_tokenizer, "sizes differ: [0-9]+ in the tokenizer, [0-9]+ in the model"),
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
    case: str, spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
