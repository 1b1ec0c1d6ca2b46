"""What is held out has no copy among what is trained on, and is the same for every run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model

from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.errors import UserError
from electra_core.finetuning import dev_split
from electra_core.finetuning.data import read_data
from electra_core.finetuning.data_warnings import input_of
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.labelled import TextExample

SETTINGS = FinetuneSettings()


def ignore(line: str) -> None:
    pass


def split(task: Task, file: Path, settings: FinetuneSettings = SETTINGS) -> tuple[list, list]:
    _, train, dev, _ = read_data(task, file, None, settings, ignore)
    return train, dev


def labelled(path: Path, texts: list[str]) -> Path:
    draw = random.Random(0)
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{draw.choice('01')}\n" for text in texts))
    return path


def twice(make: Callable[[Path, int], Path]) -> Callable[[Path, int], Path]:
    """A file of rows, each of them twice."""

    def made(path: Path, count: int) -> Path:
        header, *rows = make(path, count).read_text().splitlines(keepends=True)
        path.write_text("".join([header, *rows, *rows]))
        return path

    return made


@pytest.mark.parametrize(
    "task, make, name",
    [
        (Classify(), twice(tiny_model.reviews), "train.tsv"),
        (Tag(), tiny_model.names_to_tag, "train.conll"),  # of few words, so many sentences are alike
        (Answer(), tiny_model.questions, "train.json"),
        (Choose(), tiny_model.choices, "train.jsonl"),
    ],
    ids=["classify", "tag", "qa", "choose"],
)
def test_the_same_input_is_never_on_both_sides(task, make, name, tmp_path):
    train, dev = split(task, make(tmp_path / name, 200))
    assert dev and {input_of(example) for example in train}.isdisjoint(map(input_of, dev))
    everything = Counter(example.id for example in [*train, *dev])
    assert everything.total() == len(everything) >= 200  # nobody is lost or there twice


def test_noise_cannot_be_learned_by_heart(tmp_path):
    """A hundred texts, each five times: the tenth that is held out is ten of them, whole."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefgh", k=20)) for _ in range(100)] * 5
    draw.shuffle(texts)
    train, dev = split(Classify(), labelled(tmp_path / "noise.tsv", texts))
    assert (len(train), len(dev)) == (450, 50)
    assert set(Counter(example.text for example in dev).values()) == {5}


def test_case_and_white_space_make_no_other_input(tmp_path):
    file, written = tmp_path / "a.csv", (str, str.upper, lambda text: text.replace(" ", "  "))
    rows = [f"{write(f'Good {chr(97 + n)}')},{n % 2}" for write in written for n in range(10)]
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    train, dev = split(Classify(), file)
    assert (len(train), len({example.text.lower().split()[1] for example in dev})) == (27, 1)


def test_letters_that_are_one_in_capitals_make_no_other_input():
    one, other, third = (
        input_of(TextExample("1", 1, text)) for text in ("Große Straße", "GROSSE STRASSE", "große")
    )
    assert one == other != third


def test_labels_are_those_of_what_is_held_out_too(tmp_path):
    rows = [f"word{n}\tB-X\n\n" for n in range(20)]
    file = tmp_path / "a.conll"
    file.write_text("".join(rows) + "more\tO\n")
    (first, *_) = split(Tag(), file)[1]
    file.write_text("".join(rows).replace(f"{first.words[0]}\tB-X", f"{first.words[0]}\tB-RARE") + "more\tO\n")
    task, _, dev, _ = read_data(Tag(), file, None, SETTINGS, ignore)
    assert "B-RARE" in {tag for example in dev for tag in example.tags} and "B-RARE" in task.labels


def test_what_is_held_out_of_other_inputs_stays_the_same(tmp_path):
    """Also in later versions: figures are of these rows."""
    file = labelled(tmp_path / "a.tsv", [f"text {n}" for n in range(100)])
    lines = [11, 14, 27, 36, 54, 60, 81, 82, 95, 101]
    assert [example.line for example in split(Classify(), file)[1]] == lines


def test_pairs_are_the_same_if_both_texts_are(tmp_path):
    file = tmp_path / "pairs.csv"
    rows = [f"a{n % 5},b{n % 4},{n % 2}" for n in range(40)]  # twenty pairs, each twice
    file.write_text("\n".join(["text1,text2,label", *rows]) + "\n")
    train, dev = split(Classify(), file)
    assert len(dev) == 4 and len({(example.text, example.pair) for example in dev}) == 2
    assert {example.text for example in train} & {example.text for example in dev}


def test_all_questions_on_a_context_stay_together(tmp_path):
    import json

    paragraphs = [
        {"context": f"Bob {n} left.", "qas": [
            {"id": f"{n}-{q}", "question": "Who?", "answers": [{"text": "Bob", "answer_start": 0}]}
            for q in range(3)
        ]}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    _, dev = split(Answer(), tmp_path / "a.json")
    assert sorted(Counter(example.context for example in dev).values()) == [3, 3]


def test_the_seed_does_not_choose_what_is_held_out(tmp_path):
    file = tiny_model.reviews(tmp_path / "train.tsv", 160)
    for settings in (SETTINGS, replace(SETTINGS, seed=7), replace(SETTINGS, batch_size=3)):
        train, dev = split(Classify(), file, settings)
        assert (len(train), len(dev)) == (144, 16)
        assert [example.line for example in dev] == sorted(example.line for example in dev)
        assert split(Classify(), file, settings) == split(Classify(), file)


@pytest.mark.parametrize(
    "texts, held_out",
    [(["a"] * 30 + ["b"] * 20 + ["c"] * 50, 20), (["a"] * 90 + list("bcdefghijk"), 10)],
    ids=["none fits into a tenth", "one is most of all"],
)
def test_large_groups_are_held_out_only_if_there_are_no_others(tmp_path, texts, held_out):
    _, dev = split(Classify(), labelled(tmp_path / "a.tsv", texts))
    assert len(dev) == held_out and "a" not in {example.text for example in dev}


def classes(path: Path, texts: dict[str, list[str]]) -> Path:
    """A file of texts by their label."""
    rows = [f"{text}\t{label}" for label, those in texts.items() for text in those]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return path


def numbered(name: str, count: int) -> list[str]:
    return [f"{name} {n}" for n in range(count)]


@pytest.mark.parametrize(
    "counts, held_out",
    [
        ({"a": 190, "b": 10}, {"a": 19, "b": 1}),
        ({"a": 97, "b": 3}, {"a": 9, "b": 1}),
        ({"a": 99, "b": 1}, {"a": 10}),  # what has one example is learned, not judged
        ({"a": 160, "b": 20, "c": 20}, {"a": 16, "b": 2, "c": 2}),
        ({"a": 35, "b": 37, "c": 9}, {"a": 3, "b": 4, "c": 1}),  # c has more than its share already
        ({"a": 10, "b": 10}, {"a": 1, "b": 1}),
        (dict.fromkeys("abcdefghij", 10), dict.fromkeys("abcdefghij", 1)),
        ({"a": 2, "b": 2}, {"a": 0, "b": 0}),
    ],
    ids=str,
)
def test_small_classes_have_their_share_of_what_is_held_out(tmp_path, counts, held_out):
    file = classes(tmp_path / "a.tsv", {label: numbered(label, count) for label, count in counts.items()})
    train, dev = split(Classify(), file)
    found = Counter(example.label for example in dev)
    if any(held_out.values()):
        assert found == held_out
    assert found.total() == max(1, round(sum(counts.values()) / 10))
    assert {example.label for example in train} == set(counts)
    assert split(Classify(), file, replace(SETTINGS, seed=5)) == (train, dev)


def test_copies_stay_together_before_labels_are_shared_out(tmp_path):
    texts = {"a": numbered("a", 80), "b": ["same"] * 8, "c": ["one", "two"] * 6}
    train, dev = split(Classify(), classes(tmp_path / "a.tsv", texts))
    assert Counter(example.label for example in dev) == {"a": 10}  # b is of one text, a half of c too much
    texts["c"] = ["one", "two", "three"] * 4
    train, dev = split(Classify(), classes(tmp_path / "a.tsv", texts))
    assert Counter(example.label for example in dev) == {"a": 6, "c": 4}
    assert {example.label for example in train} == {"a", "b", "c"}


def test_no_class_loses_its_only_text_while_others_can_spare_one(tmp_path):
    """Also where copies are more than any class's quota, so that none is held out by quota."""
    texts = {label: numbered(label, 4) * 2 for label in "abc"} | {label: numbered(label, 2) for label in "de"}
    texts |= {label: ["alone"] for label in "fg"}
    rows = [TextExample("", 1, f"{label} {text}", None, label) for label, some in texts.items() for text in some]
    for first in range(len(rows)):  # another order of the draw for each
        train, dev = dev_split.split([*rows[first:], *rows[:first]], "a.tsv", by_label=True)
        assert {example.label for example in train} == set(texts) and len(dev) == 3


def test_labels_that_copies_do_not_share_are_shared_out_all_the_same(tmp_path):
    texts = {"a": numbered("x", 50), "b": numbered("x", 50), "c": numbered("c", 20)}
    train, dev = split(Classify(), classes(tmp_path / "a.tsv", texts))
    assert Counter(example.label for example in dev) == {"a": 5, "b": 5, "c": 2}
    assert {example.text for example in train}.isdisjoint(example.text for example in dev)


def test_large_classes_do_not_change_what_is_held_out(tmp_path):
    draw = random.Random(1)
    examples = [TextExample(str(n), n + 1, f"text {n}", None, draw.choice("001")) for n in range(3000)]
    held_out = dev_split.split(examples, "a.tsv", by_label=True)[1]
    assert held_out == dev_split.split(examples, "a.tsv")[1] and len(held_out) == 300


def test_labels_that_all_differ_are_split(tmp_path):
    file = classes(tmp_path / "a.tsv", {str(n): [f"text {n}"] for n in range(30)})
    assert len(split(Classify(), file)[1]) == 3


def told(task, train, dev=None, **settings) -> list[str]:
    """What reading says, without what was read."""
    lines: list[str] = []
    read_data(task, train, dev, replace(SETTINGS, **settings), lines.append)
    return lines[1:]


def test_labels_without_an_example_are_told(tmp_path):
    train = classes(tmp_path / "a.tsv", {"a": numbered("a", 30), "b": ["one"]})
    dev = classes(tmp_path / "dev.tsv", {"a": numbered("other", 5)})
    no_example = "warning: no dev example has the label 'b' (cannot be evaluated"
    assert told(Classify(), train) == [f"{no_example}; its single example stays in training)"]
    assert told(Classify(), train, dev) == [f"{no_example})"]
    assert told(Classify(labels=("a", "b", *"cdefghi")), train, dev) == [
        "warning: no training example has the labels 'c', 'd', 'e', 'f', 'g' and 2 others (cannot be learned)",
        "warning: no dev example has the labels 'b', 'c', 'd', 'e', 'f' and 3 others (cannot be evaluated)",
    ]
    several = classes(tmp_path / "b.tsv", {"a": numbered("a", 30), "b": ["one"], "c": ["two"], "d": ["x", "X"]})
    assert told(Classify(), several) == [
        "warning: no dev example has the labels 'b', 'c', 'd' (cannot be evaluated; 2 of them have a single "
        "example, which stays in training)"
    ]


def test_another_oddity_of_labels_does_not_hide_those_without_an_example(tmp_path):
    """Only that the labels are something else than classes would be why."""
    texts = {"good": numbered("a", 30), "bad": numbered("b", 30), "GOOD": ["one"], "other": ["two"]}
    alike, unseen = told(Classify(), classes(tmp_path / "a.tsv", texts))
    assert "'good' (30) / 'GOOD' (1)" in alike and "no dev example has the labels 'GOOD', 'other' " in unseen
    assert unseen.endswith("(cannot be evaluated; each has a single example, which stays in training)")
    numbers = {"a": numbered("a", 30)} | {str(number): [f"text {number}"] for number in range(20)}
    (of_one,) = told(Classify(), classes(tmp_path / "b.tsv", numbers))
    assert "have only one example each; is this the right column" in of_one


def test_rare_labels_are_named_where_not_all_are(tmp_path):
    counts = {"actor": 30, "book": 20, "city": 12, "song": 9, "river": 7, "film": 6, "bookk": 2, "actresss": 1}
    texts = {label: numbered(label, count) for label, count in counts.items()}
    lines: list[str] = []
    read_data(Classify(), classes(tmp_path / "a.tsv", texts), None, SETTINGS, lines.append)
    assert lines[0].endswith(
        "(actor 30, book 20, city 12, song 9, river 7, and 3 others, 2 with fewer than 5: actresss 1, bookk 2)"
    )
    many = texts | {f"slip {number}": [f"slip {number}"] for number in range(6)}
    read_data(Classify(), classes(tmp_path / "b.tsv", many), None, SETTINGS, lines.append)
    (line,) = (line for line in lines if "b.tsv: " in line and "rows" in line)
    assert line.endswith(
        "and 9 others, 8 with fewer than 5: slip 5 1, slip 4 1, slip 3 1, slip 2 1, slip 1 1, ...)"
    )
    shown = {label: texts[label] for label in ("actor", "bookk", "actresss")}
    lines.clear()
    read_data(Classify(), classes(tmp_path / "c.tsv", shown), None, SETTINGS, lines.append)
    assert lines[0].endswith("(actor 30, bookk 2, actresss 1)")
    lines.clear()
    few = {label: numbered(label, 3) for label in "abcdefg"}  # where all are rare, none is a slip
    read_data(Classify(), classes(tmp_path / "d.tsv", few), None, SETTINGS, lines.append)
    assert lines[0].endswith("e 3, and 2 others)")


@pytest.mark.parametrize("several", [False, True])
def test_texts_with_different_labels_are_told(tmp_path, several):
    task: Classify | MultiLabel = MultiLabel() if several else Classify()
    both = {"bad": numbered("a", 30), "good": [*numbered("b", 20), "A  3", "a 5", "b 7"]}
    file = classes(tmp_path / "a.tsv", both)
    (line,) = told(task, file)
    assert line == (
        f"warning: {file}: 2 texts occur with different labels; first: lines 5 ('bad') and 52 ('good')"
    )
    file = classes(tmp_path / "b.tsv", {"bad": numbered("a", 30), "good": [*numbered("b", 20), "a 3"]})
    assert "1 text occurs with different labels" in told(task, file)[0]


def test_numbers_of_one_text_may_differ(tmp_path):
    """Several people's judgements are averaged so."""
    assert told(Regress(), classes(tmp_path / "a.tsv", {"1": numbered("a", 30), "2": numbered("a", 30)})) == []


def test_weights_that_let_one_example_rule_are_told(tmp_path):
    few = classes(tmp_path / "a.tsv", {"a": numbered("a", 102), "b": numbered("b", 2)})
    dev = classes(tmp_path / "dev.tsv", {"a": ["x"], "b": ["y"]})
    assert told(Classify(), few, dev) == []
    assert told(Classify(), few, dev, class_weights=True, metric="mcc") == [
        "warning: class_weights: an example of 'b' (2) weighs 51 times as much as one of 'a' (102); leave out "
        "very rare classes, or the weights"
    ]
    more = classes(tmp_path / "b.tsv", {"a": numbered("a", 100), "b": numbered("b", 2)})
    assert told(Classify(), more, dev, class_weights=True, metric="mcc") == []


def test_where_classes_count_alike_so_they_do_in_the_choice_of_the_best(tmp_path):
    """By accuracy the best evaluation was often the one in which the rare class was never predicted."""
    file = classes(tmp_path / "a.tsv", {"a": numbered("a", 80), "b": numbered("b", 20)})
    line = "with class_weights the best evaluation is that of the highest macro_f1, unless metric is set"
    for task, settings, metric in (
        (Classify(), {"class_weights": True}, "macro_f1"),
        (Classify(), {"class_weights": True, "metric": "accuracy"}, "accuracy"),
        (Classify(metric="mcc"), {"class_weights": True}, "mcc"),
        (Classify(), {}, "accuracy"),
    ):
        said: list[str] = []
        fitted, *_ = read_data(task, file, None, replace(SETTINGS, **settings), said.append)
        assert fitted.metric == metric and (line in said) == (metric == "macro_f1")


@pytest.mark.parametrize("count, message", [(1, "a single example cannot"), (5, "5 examples with the same inp")])
def test_what_cannot_be_split_is_said(tmp_path, count, message):
    with pytest.raises(UserError, match=f"a.tsv: {message}.*; give a dev file"):
        split(Regress(), labelled(tmp_path / "a.tsv", ["same"] * count))


def test_sentences_that_nothing_ends_are_one(tmp_path):
    (tmp_path / "a.conll").write_text("Ann B-PER\nmet O\nBob B-PER\nslept O\n")
    with pytest.raises(UserError, match=r"a single example \(an empty line ends a sentence\) cannot be split"):
        split(Tag(), tmp_path / "a.conll")


# ---- the figure that is chosen by


TWO_CLASSES = ["accuracy", "mcc", "macro_f1", "f1", "acc_and_f1", "auc", "average_precision"]


def test_what_is_chosen_by_can_be_any_figure_of_the_task(tmp_path):
    two = tiny_model.reviews(tmp_path / "two.tsv", 40)
    three = labelled(tmp_path / "three.tsv", [f"text {n}" for n in range(40)])
    three.write_text(three.read_text() + "text a\t2\ntext b\t2\n")
    tags = tiny_model.names_to_tag(tmp_path / "a.conll", 40)
    cases: list[tuple[Task, Path, list[str], list[str]]] = [
        (Classify(), two, TWO_CLASSES, ["F1", "mse"]),
        (Classify(), three, ["accuracy", "mcc", "macro_f1"], ["f1", "auc"]),
        (Regress(), three, ["pearson", "spearman", "pearson_and_spearman"], ["mse"]),  # of which less is better
        (Tag(), tags, ["precision", "recall", "f1", "accuracy"], ["macro_f1"]),
        (Answer(), tiny_model.questions(tmp_path / "a.json", 20), ["exact_match", "f1"], ["accuracy"]),
        (Choose(), tiny_model.choices(tmp_path / "a.jsonl", 20), ["accuracy"], ["f1"]),
    ]
    for task, file, figures, others in cases:
        for figure in figures:
            fitted, _, dev, _ = read_data(task, file, None, replace(SETTINGS, metric=figure), ignore)
            assert fitted.metric == figure and figure in fitted.score(dev, right_answers(fitted, dev))
        for other in others:
            with pytest.raises(UserError, match=f"metric: expected one of {', '.join(figures)}, got '{other}'"):
                read_data(task, file, None, replace(SETTINGS, metric=other), ignore)
    assert read_data(Tag(), tags, None, SETTINGS, ignore)[0].metric == "f1"


@pytest.mark.parametrize("figure", ["auc", "average_precision"])
def test_ranking_needs_dev_examples_of_both_classes(tmp_path, figure):
    train = tiny_model.reviews(tmp_path / "train.tsv", 40)
    dev = tmp_path / "dev.tsv"
    dev.write_text("sentence\tlabel\na film\tpos\n")
    message = f"metric: {figure} needs dev examples of both classes, and all have the label 'pos'"
    with pytest.raises(UserError, match=message):
        read_data(Classify(), train, dev, replace(SETTINGS, metric=figure), ignore)
    with pytest.raises(UserError, match=message):
        read_data(Classify(metric=figure), train, dev, SETTINGS, ignore)
    read_data(Classify(), train, dev, SETTINGS, ignore)


def right_answers(task: Task, examples: list) -> list[dict]:
    """Predictions that are all right."""
    of_kind: dict[str, Callable] = {
        "classify": lambda e: {
            "label": e.label,
            "scores": {label: float(label == e.label) for label in task.labels},
        },
        "regress": lambda e: {"value": float(e.label)},
        "tag": lambda e: {"tags": list(e.tags)},
        "qa": lambda e: {"answer": e.answers[0][0]},
        "choose": lambda e: {"choice": e.label},
    }
    return [of_kind[task.kind](example) for example in examples]
