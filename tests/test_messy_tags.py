"""Sentences with tags as people really have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import json_lines, refused, words_to_predict, write

from electra_core.downstream.tagging import Tag, spans, to_iob2
from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows
from electra_core.labelled_data.tagged_files import TaggedExample, read_tagged
from electra_core.labelled_data.tagged_rows import tags_of_spans
from electra_core.metrics import span_metrics


def test_labels_that_are_given_stay_as_they_are() -> None:
    task = Tag(labels=("O", "B-X", "I-X"))
    assert task.fitted([TaggedExample("1", 1, ("ann", "met"), ("B-Y", "O"))]) == task


def test_where_no_spans_are_marked_f1_gives_way_to_accuracy() -> None:
    examples = [TaggedExample("1", 1, ("ann", "met"), ("N", "V"))]
    assert [Tag(labels).fitted(examples).metric for labels in ((), ("N", "V", "X"))] == ["accuracy"] * 2
    assert Tag(metric="macro_f1").fitted(examples).metric == "macro_f1"


# ---- CoNLL columns


def test_a_word_may_hold_a_space_that_does_not_break(tmp_path):
    file = write(tmp_path / "a.conll", "20\u00a0000 O\nAnn\tB-PER\r\n")
    assert [(e.words, e.tags) for e in read_tagged(file)] == [(("20\u00a0000", "Ann"), ("O", "B-PER"))]


@pytest.mark.parametrize("number", ["0", "²", "-1", "tag"])
def test_columns_of_conll_are_numbers_from_one(tmp_path, number):
    file = write(tmp_path / "a.conll", "Ann O\n")
    assert f"label column: expected a number from 1, got '{number}'" in refused(
        read_tagged, file, Columns(label=number)
    )
    assert f"text column: expected a number from 1, got '{number}'" in refused(
        read_tagged, file, Columns(text=number)
    )


def test_words_may_stand_in_another_column(tmp_path):
    file = write(tmp_path / "a.conll", "1 Ann NNP B-PER\n2 met VBD O\n")
    example = next(read_tagged(file, Columns(text="2", label="3")))
    assert (example.words, example.tags) == (("Ann", "met"), ("NNP", "VBD"))


def test_words_alone_are_enough_for_a_prediction(tmp_path):
    file = write(tmp_path / "a.conll", "Ann\nmet\n\nBob\n")
    assert words_to_predict(file, Columns(label="4")) == [["Ann", "met"], ["Bob"]]
    assert "a word without a tag" in refused(read_tagged, file, Columns(label="4"))


CONLLU = """\
# newdoc
# sent_id = 1
# text = Il va du marché
1\tIl\til\tPRON\t_\t_\t2\tnsubj\t_\t_
2\tva\taller\tVERB\t_\t_\t0\troot\t_\t_
2.1\tlà\t_\tADV\t_\t_\t_\t_\t_\t_
3-4\tdu\t_\t_\t_\t_\t_\t_\t_\t_
3\tde\tde\tADP\t_\t_\t5\tcase\t_\t_
4\tle\tle\tDET\t_\t_\t5\tdet\t_\t_
5\tmarché\tmarché\tNOUN\t_\t_\t2\tobl\t_\tSpaceAfter=No

# sent_id = 2
1-2\tDu\t_\t_\t_\t_\t_\t_\t_\t_
1\tDe\tde\tADP\t_\t_\t3\tcase\t_\t_
2\tLe\tle\tDET\t_\t_\t3\tdet\t_\t_
3\t20 000\t20 000\tNUM\t_\t_\t0\troot\t_\t_
"""


@pytest.mark.parametrize("cut", [0, 11])  # with its second sentence alone it begins with a range
def test_conllu_holds_more_lines_than_words(tmp_path, cut):
    file = write(tmp_path / "a.conllu", "".join(CONLLU.splitlines(keepends=True)[cut:]))
    sentences = [
        (("Il", "va", "de", "le", "marché"), ("PRON", "VERB", "ADP", "DET", "NOUN")),
        (("De", "Le", "20 000"), ("ADP", "DET", "NUM")),
    ][1 if cut else 0 :]
    assert [(example.words, example.tags) for example in read_tagged(file)] == sentences
    heads = [example.tags for example in read_tagged(file, Columns(text="2", label="8"))]
    assert heads[-1] == ("case", "det", "root")
    assert words_to_predict(file) == [list(words) for words, _ in sentences]


def test_elsewhere_a_number_sign_and_a_range_are_words(tmp_path):
    file = write(tmp_path / "a.conll", "# O\nAnn B-PER\n\n# O\n1-2\tO\n1.1 O\n")
    assert [(example.words, example.tags) for example in read_tagged(file)] == [
        (("#", "Ann"), ("O", "B-PER")),
        (("#", "1-2", "1.1"), ("O", "O", "O")),
    ]
    assert next(read_tagged(write(tmp_path / "b.conll", "# O\n"))).words == ("#",)


def test_a_comment_has_other_columns_than_words(tmp_path):
    file = write(
        tmp_path / "a.tsv", "#\thttp://x.org [2010]\n# 2 x y\n#\tO\nAnn\tB-PER\n\n#hi\tO\n#\tO\nBob B-PER\n"
    )
    assert [(example.line, example.words) for example in read_tagged(file)] == [
        (3, ("#", "Ann")),
        (6, ("#hi", "#", "Bob")),
    ]
    assert words_to_predict(write(tmp_path / "a.conll", "# id 1\nAnn\nmet\n")) == [["Ann", "met"]]
    comments = "# id 6\n\n# id 7 domain=a\n# text = Ann\nAnn _ _ B-PER\n"
    (example,) = read_tagged(write(tmp_path / "b.conll", comments))
    assert (example.words, example.tags) == (("Ann",), ("B-PER",))
    within = write(tmp_path / "c.conll", "Ann B-PER\n# O O\nmet O\n")
    assert "c.conll:1: expected 2 columns as before, got 3 (line 2)" in refused(read_tagged, within)


def test_an_empty_column_of_conllu_is_no_tag(tmp_path):
    file = write(tmp_path / "a.conllu", CONLLU.replace("\tVERB\t", "\t\t"))
    assert "a.conllu:4: an empty column (line 5)" in refused(read_tagged, file)


CONLLU_PLUS = """\
# newdoc
# global.columns = FORM ID UPOS NE:TYPE
Ann\t1\tPROPN\tB-PER
von\t2-3\t_\t_
vo\t2\tADP\tO
n\t3\tDET\tO

# text = 1-2
1-2\t1\tNUM\tO
"""


def test_conllu_plus_names_its_columns(tmp_path):
    file = write(tmp_path / "a.conllup", CONLLU_PLUS)
    by_name = Columns(label="NE:TYPE")
    assert [(example.words, example.tags) for example in read_tagged(file)] == [
        (("Ann", "vo", "n"), ("PROPN", "ADP", "DET")),
        (("1-2",), ("NUM",)),
    ]
    for columns in (by_name, Columns(label="4"), Columns(text="FORM", label="4")):
        assert [example.tags for example in read_tagged(file, columns)] == [("B-PER", "O", "O"), ("O",)]
    assert words_to_predict(file, by_name) == [["Ann", "vo", "n"], ["1-2"]]
    without = write(tmp_path / "b.conllup", CONLLU_PLUS.replace("UPOS", "POS"))
    assert [example.tags for example in read_tagged(without)] == [("B-PER", "O", "O"), ("O",)]
    with pytest.raises(UserError, match="a number from 1 or one of FORM, ID, UPOS, NE:TYPE, got 'NE'"):
        list(read_tagged(file, Columns(label="NE")))


def test_columns_of_conllu_have_names(tmp_path):
    file = write(tmp_path / "a.conllu", CONLLU)
    assert [example.tags for example in read_tagged(file, Columns(label="DEPREL"))][-1] == ("case", "det", "root")


# ---- rows


def test_lists_of_words_under_another_name(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"pieces": ["Ann", "met"], "marks": [1, 0]})
    columns = Columns(text="pieces", label="marks")
    assert [(e.words, e.tags) for e in read_tagged(file, columns)] == [(("Ann", "met"), ("1", "0"))]
    assert words_to_predict(file, columns) == [["Ann", "met"]]
    assert words_to_predict(write(tmp_path / "a.txt", "Ann met\n"), columns) == [["Ann", "met"]]
    assert "no list of words (expected in tokens or words)" in refused(read_tagged, file)


@pytest.mark.parametrize("tag", [None, "", float("nan"), ["O"]])
def test_tags_that_are_none(tmp_path, tag):
    file = json_lines(tmp_path / "a.jsonl", {"tokens": ["a", "b"], "tags": ["O", tag]})
    assert "a.jsonl:1: a tag is empty or not text (tag 2: " in refused(read_tagged, file)
    assert words_to_predict(file) == [["a", "b"]]  # to predict, tags do not matter


def test_half_characters(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"tokens": ["a"], "tags": ["B-\ud800"]})
    assert "a.jsonl:1: not valid UTF-8" in refused(read_tagged, file)
    json_lines(file, {"text": "Ann \ud800"})
    assert "a.jsonl:1: not valid UTF-8" in refused(read_tagged, file, labelled=False)


def test_texts_to_predict_in_a_csv_or_tsv(tmp_path):
    csv = write(tmp_path / "a.csv", 'id,sentence\n7,"Ann met Bob, twice"\n8,Eve\n')
    rows = [(example.id, example.text) for example in read_tagged(csv, labelled=False)]
    assert rows == [("7", "Ann met Bob, twice"), ("8", "Eve")]
    tsv = write(tmp_path / "a.tsv", "sentence\tid\nAnn met Bob, twice\t7\n")
    assert words_to_predict(tsv) == [["Ann", "met", "Bob", ",", "twice"]]
    assert words_to_predict(write(tmp_path / "b.tsv", "Ann\tO\nmet\tO\n")) == [["Ann", "met"]]  # CoNLL columns
    assert "expected one row per word, columns Sentence #, Word, Tag, got id, sentence; " in refused(
        read_tagged, csv
    )
    no_text = write(tmp_path / "b.csv", "satz\nfein\n")
    assert "b.csv:2: no list of words" in refused(read_tagged, no_text, labelled=False)
    assert words_to_predict(no_text, Columns(text="satz")) == [["fein"]]


# ---- tags


def test_marks_may_be_small_letters_and_the_middle_may_be_m():
    assert to_iob2(["o", "b-per", "i-per", "s-LOC", "B-X", "M-X", "E-X", "M-X"]) == [
        "O", "B-per", "I-per", "B-LOC", "B-X", "I-X", "I-X", "B-X",
    ]  # fmt: skip


def test_bilou_is_iobes():
    assert to_iob2(["U-X", "B-X", "I-X", "L-X", "O", "U-Y"]) == ["B-X", "B-X", "I-X", "I-X", "O", "B-Y"]


@pytest.mark.parametrize("form", ["{mark}_{kind}", "{kind}-{mark}", "{kind}_{mark}"])
def test_marks_may_stand_behind_and_be_joined_otherwise(tmp_path, form):
    def file(name: str, *tags: str) -> Path:
        spelled = [form.format(mark=tag[0], kind=tag[2:]) if tag[1:] else tag for tag in tags]
        return json_lines(tmp_path / name, {"tokens": list("abcdefgh"[: len(tags)]), "tags": spelled})

    train, dev = file("a.jsonl", "B-S", "E-S", "O", "S-geo_loc"), file("b.jsonl", "B-geo_loc", "I-geo_loc", "B-S")
    (example,) = examples = list(Tag().read(train, BadRows(train)))
    assert example.tags == ("B-S", "I-S", "O", "B-geo_loc")
    task = Tag().fitted(examples)
    assert task.labels == ("O", "B-S", "I-S", "B-geo_loc", "I-geo_loc")
    assert [e.tags for e in task.read(dev, BadRows(dev))] == [("B-geo_loc", "I-geo_loc", "B-S")]
    bad = BadRows(dev, skip=True)
    assert (
        not list(task.read(file("b.jsonl", "B-Z"), bad))
        and "a tag is not in the training data ('B-Z')" in bad.first[0]
    )


@pytest.mark.parametrize(
    "tags, labels",
    [
        (["o", "b-per"], ("O", "B-per", "I-per")),
        (["I-X", "I-Y"], ("O", "B-X", "I-X", "B-Y", "I-Y")),  # no word outside of a span
        (["NN", "O"], ("NN", "O")),
        (["B", "O"], ("O", "B", "I")),
        (["i", "o"], ("O", "B", "I")),
        (["S", "O"], ("O", "S")),  # a subject and an object, for all that is known
        (["I", "E"], ("E", "I")),  # no O
        (["PP-B", "NN_S"], ("NN_S", "PP-B")),  # no O either
        (["O", "NN-S", "NN-L"], ("NN-L", "NN-S", "O")),  # neither a B nor an I
        (["I", "N"], ("I", "N")),  # an interjection and a noun
    ],
)
def test_what_counts_as_tags_of_spans(tmp_path, tags, labels):
    file = json_lines(tmp_path / "a.jsonl", {"tokens": list("abc"[: len(tags)]), "tags": tags})
    task = Tag()
    task = task.fitted(list(task.read(file, BadRows(file))))
    assert task.labels == labels and task.metric == ("f1" if labels[1][0] == "B" else "accuracy")


def test_spans_without_types(tmp_path):
    file = write(tmp_path / "a.conll", "Ann B\nLee E\nmet O\n\nHi I\n\nBob S\nEve I\n")
    examples = list(Tag().read(file, BadRows(file)))
    assert [example.tags for example in examples] == [("B", "I", "O"), ("B",), ("B", "B")]
    task = Tag().fitted(examples)
    assert [example.tags for example in task.read(file, BadRows(file))] == [example.tags for example in examples]
    assert spans(["I", "O", "B", "I", "B"]) == [("", 0, 1), ("", 2, 4), ("", 4, 5)]
    predictions = [{"tags": list(example.tags)} for example in examples]
    assert task.score(examples, predictions)["f1"] == 1.0
    predictions[0]["tags"] = ["B", "O", "O"]
    assert task.score(examples, predictions)["f1"] == 0.75
    (row,) = span_metrics([example.tags for example in examples], [p["tags"] for p in predictions])[1]
    assert (row["label"], row["support"]) == ("_", 4)


def test_a_letter_is_a_part_of_speech_where_others_are(tmp_path):
    file = write(tmp_path / "a.conll", "oh I\n\nAnn N\nand O\n")
    assert [example.tags for example in Tag().read(file, BadRows(file))] == [("I",), ("N", "O")]


def test_a_header_or_a_slip_does_not_turn_spans_into_plain_tags(tmp_path):
    for file, message in (
        (write(tmp_path / "a.tsv", "word\ttag\nAnn\tB-PER\nmet\tO\n"), "line 1 has the tag 'tag'"),
        (write(tmp_path / "a.conll", "Ann B-PER\nmet O\n\nBob BPER\n"), "line 4 has the tag 'BPER'"),
        (write(tmp_path / "b.tsv", "word\ttag\nAnn\tB_PER\nmet\tO\n"), "line 1 has the tag 'tag'"),
    ):
        with pytest.raises(UserError, match=message):
            Tag().fitted(list(Tag().read(file, BadRows(file))))


def test_one_tag_for_all_words_is_nothing_to_learn(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"tokens": ["a", "b"], "tags": ["O", "O"]})
    with pytest.raises(UserError, match="every training word has the tag 'O'"):
        Tag().fitted(list(Tag().read(file, BadRows(file))))


# ---- a row per word, and spans in a text


KAGGLE = 'Sentence #,Word,POS,Tag\nSentence: 1,EU,NNP,B-ORG\n,",",x,O\nSentence: 2,Ann,NNP,B-PER\n'
WORDS_AND_TAGS = [(2, ("EU", ","), ("B-ORG", "O")), (4, ("Ann",), ("B-PER",))]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", KAGGLE),
        ("a.csv", KAGGLE.replace("Sentence #,Word", "sentence_id,token").replace("\n,", "\nSentence: 1,")),
        ("a.tsv", KAGGLE.replace('","', "\x00").replace(",", "\t").replace("\x00", ",")),
    ],
    ids=["csv", "every row has its sentence", "tsv"],
)
def test_a_table_may_have_a_row_per_word(tmp_path, name, content):
    file = write(tmp_path / name, content)
    assert [(e.line, e.words, e.tags) for e in read_tagged(file)] == WORDS_AND_TAGS
    assert [e.words for e in read_tagged(file, labelled=False)] == [words for _, words, _ in WORDS_AND_TAGS]
    assert [e.tags for e in read_tagged(file, Columns(label="POS"))] == [("NNP", "x"), ("NNP",)]
    assert [e.tags for e in read_tagged(file, Columns(label="3"))] == [("NNP", "x"), ("NNP",)]


def test_rows_of_words_that_cannot_be_used(tmp_path):
    file = write(tmp_path / "a.csv", KAGGLE.replace('",",x', ",x").replace("Ann", "Ann,Bob") + "3,Eve,x,O\n")
    bad = BadRows(file, skip=True)
    assert [e.words for e in read_tagged(file, bad=bad)] == [("Eve",)]
    assert bad.first[0].endswith("a.csv:2: an empty column (line 3)")
    assert bad.first[1].endswith("a.csv:4: expected 4 columns, got 5 (line 4)")
    said = refused(read_tagged, write(tmp_path / "a.csv", "Sentence #,Word\n1,EU\n"))
    assert "a.csv: expected one row per word, columns Sentence #, Word, Tag, got Sentence #, Word;" in said
    assert "holds no rows" in refused(read_tagged, write(tmp_path / "a.csv", "Sentence #,Word,Tag\n"))
    twice = write(tmp_path / "a.tsv", "EU\tO\tO\nis\tO\tO\n")
    assert next(read_tagged(twice)).words == ("EU", "is")


@pytest.mark.parametrize(
    "spans",
    [
        {"entities": [[0, 2, "ORG"], [11, 25, "MISC"]]},
        {"spans": [{"start": 11, "end": 25, "label": "MISC"}, {"start": 0, "end": 2, "type": "ORG"}]},
        {"label": [[11, 25, "MISC"], [0, 2, "ORG"], [0, 2, "ORG"]]},
    ],
    ids=["lists", "dicts", "a field called label"],
)
def test_a_text_may_have_the_places_of_its_spans(tmp_path, spans):
    text = "EU rejects German-Swiss calls"
    (example,) = read_tagged(json_lines(tmp_path / "a.jsonl", {"text": text, **spans}))
    assert example.words == ("EU", "rejects", "German-Swiss", "c", "alls"), "cut where a span ends"
    assert example.tags == ("B-ORG", "O", "B-MISC", "I-MISC", "O")
    assert [text[a:b] for a, b in example.offsets] == list(example.words) and example.text == text


def test_one_span_may_begin_where_another_ends():
    places, tags, problem = tags_of_spans("東京大阪へ", [[2, 4, "X"], [0, 2, "X"]])
    assert tags == ["B-X", "I-X", "B-X", "I-X", "O"] and len(places) == 5 and not problem


@pytest.mark.parametrize(
    "spans, message",
    [
        ([[0, 3]], r"expected spans as \[start, end, type\] or dicts of these \(got \[0, 3\]\)"),
        ([{"start": 0, "end": "3", "label": "X"}], "expected spans as"),
        ([[0, 99, "X"]], "a span contains no word of the text"),
        ([[3, 4, "X"]], "a span contains no word of the text"),
        ([[11, 12, "X"]], "a span contains no word of the text"),
        ([[0, 7, "X"], [4, 8, "Y"]], r"two spans overlap \(characters 0 to 7, and from 4\); nested spans are not"),
        (None, r"neither a list of words nor a text with entities \(expected \[\[start, end, type\], ...\]\)"),
    ],
    ids=["too few", "text", "behind the end", "a space", "nothing seen", "overlap", "none"],
)
def test_spans_that_cannot_be_used(tmp_path, spans, message):
    file = json_lines(tmp_path / "a.jsonl", {"text": "Ann met Bob\u200b", "entities": spans})
    with pytest.raises(UserError, match=f"a.jsonl:1: {message}"):
        list(read_tagged(file))
    assert [e.words for e in read_tagged(file, labelled=False)] == [("Ann", "met", "Bob")]
