"""Several corpora as one: weights, coverage, purity, and what cannot be mixed."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from small_runs import RUN, SIZES, one_thread  # noqa: F401

from electra_core.cli import main
from electra_core.config import PretrainConfig
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.examples import Examples
from electra_core.prepare import prepare
from electra_core.pretrain import pretrain
from electra_core.pretraining.mixing import BLOCK, MixedExamples, Mixture, examples_of, open_data
from electra_core.tokenizer import WordPieceTokenizer

LENGTH = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"{kind}{i}" for kind in "ab" for i in range(50))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora of words that tell which is which, one three times as large."""
    folder = tmp_path_factory.mktemp("mixed")
    WordPieceTokenizer.from_tokens(WORDS).save(folder / "words")
    made = []
    for kind, documents in (("a", 90), ("b", 30)):
        text = (" ".join(f"{kind}{(3 * d + i) % 50}" for i in range(120)) + " ." for d in range(documents))
        (folder / f"{kind}.txt").write_text("\n\n".join(text))
        made.append(folder / kind)
        prepare(
            [folder / f"{kind}.txt"], made[-1], tokenizer=folder / "words", heldout_fraction=0.2, shard_tokens=2000
        )
    return made[0], made[1]


def opened(folders: tuple[Path, Path], weights: list[float] | None = None) -> Mixture:
    corpus = open_data(folders, weights)
    assert isinstance(corpus, Mixture)
    return corpus


def mixed(folders: tuple[Path, Path], weights: list[float] | None = None, seed: int = 0) -> MixedExamples:
    examples = examples_of(opened(folders, weights), PretrainConfig(max_length=LENGTH), seed)
    assert isinstance(examples, MixedExamples)
    return examples


def texts(examples: Examples, indices: range) -> list[list[int]]:
    batch = examples.batch(examples.plan(indices))
    borders = batch.cu_seqlens.tolist()
    return [batch.input_ids_T[a:b].tolist() for a, b in itertools.pairwise(borders)]


def kind_of(ids: list[int]) -> str:
    """Of which corpus an example's words are; they must all be of one."""
    kinds = {WORDS[i][0] for i in ids} - {"[", "."}
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize(("weights", "of_a"), [([3, 1], 768), ([1, 9], 102), ([0.5, 0.5], 512), (None, None)])
def test_every_block_holds_the_weights(
    folders: tuple[Path, Path], weights: list[float] | None, of_a: int | None
) -> None:
    examples = mixed(folders, weights)
    if of_a is None:
        sizes = [Corpus.open(folder).num_tokens for folder in folders]
        of_a = round(BLOCK * sizes[0] / sum(sizes))
    orders = set()
    for block in (0, 1, 10**9):
        places = [examples.place(index)[0] for index in range(block * BLOCK, (block + 1) * BLOCK)]
        assert abs(places.count(0) - of_a) <= (weights == [1, 9])
        assert 0 < sum(places[: BLOCK // 2]) < BLOCK, "mixed, not one after the other"
        orders.add(tuple(places))
    assert len(orders) == 3, "each block in an order of its own"


def test_words_are_those_of_the_corpus(folders: tuple[Path, Path]) -> None:
    examples = mixed(folders, [3, 1])
    kinds = [kind_of(ids) for ids in texts(examples, range(512))]
    assert kinds == ["ab"[examples.place(index)[0]] for index in range(512)]


def test_each_corpus_is_read_through_its_own_examples_in_order(folders: tuple[Path, Path]) -> None:
    examples = mixed(folders, [3, 1])
    seen: dict[int, list[int]] = {0: [], 1: []}
    for index in range(3 * BLOCK):
        corpus, inside = examples.place(index)
        seen[corpus].append(inside)
    assert sorted(seen[0]) == list(range(3 * 768)) and sorted(seen[1]) == list(range(3 * 256))


def test_a_pure_function_of_seed_and_index(folders: tuple[Path, Path]) -> None:
    whole = texts(mixed(folders, [2, 1]), range(100, 140))
    parts = [texts(mixed(folders, [2, 1]), range(first, first + 8))[::-1] for first in range(132, 92, -8)]
    assert [ids for part in parts for ids in part][::-1] == whole
    assert texts(mixed(folders, [2, 1], seed=1), range(100, 140)) != whole
    assert Counter(map(kind_of, texts(mixed(folders, [2, 1], seed=1), range(BLOCK)))) == {"a": 683, "b": 341}


def test_no_corpus_is_drawn_from_as_another_is(folders: tuple[Path, Path]) -> None:
    """Were they equal, they would still be read in two orders, with segments cut at other places."""
    twins = MixedExamples(Mixture([Corpus.open(folders[0])] * 2, [1, 1]), LENGTH, seed=0)
    began: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for index in range(BLOCK):
        corpus, place = twins.place(index)
        began[corpus].append((place, twins.one(index).first[0].begin))
    first, second = (dict(starts) for starts in began.values())
    assert first.keys() == second.keys() and sum(first[place] == second[place] for place in first) < BLOCK // 4


def test_what_a_mixture_tells_of_itself(folders: tuple[Path, Path]) -> None:
    corpora = [Corpus.open(folder) for folder in folders]
    mixture = opened(folders, [3, 1])
    assert mixture.num_tokens == sum(corpus.num_tokens for corpus in corpora)
    assert mixture.num_documents == sum(corpus.num_documents for corpus in corpora)
    assert mixture.num_sentences == sum(corpus.num_sentences for corpus in corpora)
    shards = [shard for corpus in corpora for shard in corpus.shards]
    assert [shard.tokens.tolist() for shard in mixture.shards] == [shard.tokens.tolist() for shard in shards]
    prints = {
        mixture.fingerprint,
        opened(folders, [1, 3]).fingerprint,
        *(corpus.fingerprint for corpus in corpora),
    }
    prints.add(opened((folders[1], folders[0]), [1, 3]).fingerprint)
    assert len(prints) == 5 and opened(folders, [6, 2]).fingerprint == mixture.fingerprint
    assert open_data(folders[0]).fingerprint == corpora[0].fingerprint
    assert open_data(folders, split="heldout").split == "heldout"
    mixture.verify()


@pytest.mark.parametrize("damaged", [0, 1])
def test_every_corpus_of_a_mixture_is_verified(folders: tuple[Path, Path], tmp_path: Path, damaged: int) -> None:
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    tokens = copies[damaged] / "train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=rf"{folders[damaged].name}/train-00000\.tokens: damaged"):
        opened((copies[0], copies[1])).verify()


def test_what_cannot_be_mixed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    WordPieceTokenizer.from_tokens([*WORDS, "c"]).save(tmp_path / "words")
    (tmp_path / "c.txt").write_text("c c c .")
    prepare([tmp_path / "c.txt"], tmp_path / "c", tokenizer=tmp_path / "words", heldout_fraction=0)
    for data, weights, message in (
        ([folders[0], tmp_path / "c"], None, "different tokenizers"),
        (folders, [1.0], "one weight per corpus, 2, got 1"),
        (folders, [1.0, 0.0], r"positive numbers, at most 3.4e\+38, got 1 0"),
        (folders, [1.0, float("nan")], "positive numbers"),
        (folders, [1e308, 1e308], r"positive numbers, at most 3.4e\+38, got 1e\+308 1e\+308"),
        (folders, [1e6, 1.0], "has less than 1/1024 of the weight"),
        ([folders[0], folders[0]], None, "is given twice; to sample it more often, use mix"),
        (
            [folders[0], folders[0] / ".." / folders[0].name],
            None,
            "is given twice; to sample it more often, use mix",
        ),
        (folders[0], [1.0], "mix: no effect with a single corpus"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(data, weights)
    WordPieceTokenizer.from_tokens(WORDS).save(tmp_path / "same")
    (tmp_path / "a.txt").write_text("a1 a2 .")
    prepare([tmp_path / "a.txt"], tmp_path / "empty", tokenizer=tmp_path / "same", heldout_fraction=0)
    with pytest.raises(UserError, match="has no heldout documents, so it cannot be mixed in"):
        open_data([folders[0], tmp_path / "empty"], split="heldout")


def test_pretraining_on_a_mixture_resumes_exactly(folders: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {**RUN, "steps": 4, "checkpoint_every": 2}
    options = {"model": "tiny", "encoder_changes": SIZES, "device": "cpu", "quiet": True, "mix": [3, 1]}
    pretrain(folders, tmp_path / "whole", changes=changes, **options)
    state = tmp_path / "whole" / "checkpoints"
    last = (state / "step-00000004" / "state.safetensors").read_bytes()
    shutil.rmtree(state / "step-00000004")
    with pytest.raises(UserError, match=r"the corpus .* differs"):
        pretrain(folders, tmp_path / "whole", changes=changes, resume=True, **{**options, "mix": [1, 3]})
    pretrain(folders, tmp_path / "whole", changes=changes, resume=True, **options)
    assert (state / "step-00000004" / "state.safetensors").read_bytes() == last
    identity = json.loads((state / "step-00000004" / "state.json").read_text())["identity"]
    assert identity["data"] == opened(folders, [3, 1]).fingerprint


def test_on_the_command_line(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [part for name, value in {**RUN, **SIZES, "steps": 2}.items()
             for part in ("--" + name.replace("_", "-"), str(value))]  # fmt: skip
    data = ["--data", str(folders[0]), "--data", str(folders[1])]
    command = ["pretrain", *data, "--model", "tiny", "--device", "cpu", "--quiet", *sizes]
    command += ["--out", str(tmp_path / "run")]
    assert main([*command, "--mix", "1"]) == 2
    assert "one weight per corpus, 2" in capsys.readouterr().err
    assert main([*command, "--mix", "3", "1"]) == 0
