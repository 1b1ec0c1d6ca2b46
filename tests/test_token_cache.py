"""Tokenised data on disk: the same features come back, anything that changes them makes another entry."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch

from electra_core.downstream.choices import ChoiceExample, Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task, encode_all
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.finetuning import token_cache
from electra_core.labelled_data.features import Features
from electra_core.labelled_data.labelled import MultiLabelExample, TextExample
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import TaggedExample
from electra_core.tokenizer import Tokenizer, load_tokenizer

TEXTS = [TextExample(str(n), n, f"the film was great {n}", "dull" if n % 2 else None, "pos") for n in range(5)]
TASKS = {
    "classify": (Classify(labels=("neg", "pos"), max_length=8), TEXTS),
    "regress": (Regress(scale=1.0), [replace(example, label="2.5") for example in TEXTS]),
    "tag": (
        Tag(labels=("O", "B-X")),
        [TaggedExample("1", 1, ("the", "film"), ("O", "B-X")), TaggedExample("2", 2, ("great",), ("O",))],
    ),
    "multilabel": (
        MultiLabel(labels=("a", "b", "c")),
        [MultiLabelExample("1", 1, "the film", labels=("c", "a")), MultiLabelExample("2", 2, "great", labels=())],
    ),
    "qa": (Answer(), [QuestionExample("1", "1", "what was great", "the film was great", (("film", 4),))]),
    "choose": (Choose(), [ChoiceExample("1", 1, "the film was", ("great", "dull", "bad"), 1)]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_model.make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SMALLEST", 1)


class Encoder:
    """Encodes, and counts how often it had to."""

    def __init__(self, task: Task, examples: list, tokenizer: Tokenizer, training: bool = True):
        self.arguments = (task, examples, tokenizer, training)
        self.calls = 0
        self.said: list[str] = []

    def __call__(self, folder: Path | None) -> Features:
        def encode() -> Features:
            self.calls += 1
            task, examples, tokenizer, training = self.arguments
            return encode_all(task, examples, tokenizer, training=training)

        return token_cache.cached(folder, *self.arguments, encode, self.said.append)


def assert_same(a: Features, b: Features) -> None:
    assert len(a) == len(b) and a.owners == b.owners and a.truncated == b.truncated and a.places == b.places
    one, other = (features.batch(np.arange(len(features))) for features in (a, b))
    assert torch.equal(one.targets, other.targets) and one.targets.dtype == other.targets.dtype
    assert torch.equal(one.unit_starts, other.unit_starts)
    for field in ("input_ids_T", "segment_ids_T", "position_ids_T", "cu_seqlens"):
        assert torch.equal(getattr(one.tokens, field), getattr(other.tokens, field)), field


@pytest.mark.parametrize("kind", TASKS)
def test_the_second_run_reads_what_the_first_one_wrote(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, examples = TASKS[kind]
    encode = Encoder(task, examples, tokenizer)
    plain, first, second = encode(None), encode(tmp_path / "new"), encode(tmp_path / "new")
    assert encode.calls == 2 and "from" in encode.said[0]
    assert_same(plain, first)
    assert_same(plain, second)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"], "nothing half-written stays"


def test_whatever_changes_the_result_makes_another_entry(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, examples = TASKS["classify"]
    other = [*examples[:-1], replace(examples[-1], text="the film was bad")]
    variants = [
        (task, examples, True), (task, other, True), (replace(task, max_length=6), examples, True),
        (task, examples[:-1], True), (task, examples, False),
    ]  # fmt: skip
    for variant_task, variant, training in variants:
        encode = Encoder(variant_task, variant, tokenizer, training)
        encode(tmp_path)
        assert encode.calls == 1
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_a_damaged_entry_is_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    encode = Encoder(*TASKS["classify"], tokenizer)
    plain = encode(tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[:100], whole[:-5]):
        entry.write_bytes(damaged)
        calls = encode.calls
        assert_same(encode(tmp_path), plain)
        assert encode.calls == calls + 1 and entry.read_bytes() == whole


def test_arrays_that_do_not_fit_each_other_are_no_features(tokenizer: Tokenizer) -> None:
    arrays, facts = encode_all(*TASKS["classify"], tokenizer).to_arrays() or ({}, {})
    for name in ("ids", "owners"):
        with pytest.raises(ValueError, match="expected sizes that fit each other"):
            Features.from_arrays({**arrays, name: arrays[name][:-1]}, facts)


@pytest.mark.parametrize("per_token", [False, True])
def test_no_features_at_all_are_kept_as_any_other(per_token: bool) -> None:
    arrays, facts = Features(2, 3, per_token=per_token).to_arrays() or ({}, {})
    nothing = Features.from_arrays(arrays, facts)
    assert len(nothing) == nothing.num_tokens == 0 and nothing.per_token == per_token


def test_runs_that_write_at_the_same_time_do_not_disturb_each_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    encoders = [Encoder(*TASKS["tag"], tokenizer) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda encode: encode(tmp_path), encoders))
    assert len(list(tmp_path.iterdir())) == 1
    for features in results:
        assert_same(features, results[0])


def test_a_folder_that_cannot_be_written_stops_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    encode = Encoder(*TASKS["classify"], tokenizer)
    assert len(encode(tmp_path / "file")) == len(TEXTS)
    assert "cannot be cached" in encode.said[0]


def test_who_has_no_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert token_cache.default_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert token_cache.default_folder() == Path("/somewhere/electra-core/tokens")


def test_dev_data_of_questions_are_not_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They remember where their windows lie in the text."""
    encode = Encoder(*TASKS["qa"], tokenizer, training=False)
    encode(tmp_path / "new")
    assert not (tmp_path / "new").exists()
