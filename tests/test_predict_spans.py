"""Tags and answers come back as the exact characters of the text, from windows, too."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
from untrained_predictor import untrained

from electra_core.corpora.vocabulary import train_sentencepiece
from electra_core.downstream.squad import Answer, _Place
from electra_core.downstream.tagging import Tag
from electra_core.labelled_data.features import Window
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import from_text
from electra_core.predict import evaluate
from electra_core.reports import task_report
from electra_core.tasks import UNLABELLED
from electra_core.tokenizer import load_tokenizer

STRANGE = [
    "Ann met 𝔅ob — and Eve's café, naïve?",
    "  leading  spaces\tand\ntabs ",
    "e\u0301 combining, ﬁ ligature, İstanbul, 東京 Ann 🙂 bob\u0085next",
    "x",
]


def test_spans_map_back_to_the_exact_characters(tmp_path):
    task = Tag(labels=("O", "B-X", "I-X"), max_length=24)
    tagger = untrained(task, tmp_path)
    found = 0
    for text in [*STRANGE, " ".join(["ann met bob ,"] * 40)]:
        prediction = tagger(text)
        assert len(prediction["tags"]) == len(prediction["words"])
        assert prediction["words"] == [text[a:b] for a, b in from_text(text).offsets]
        for span in prediction["spans"]:
            assert text[span["start"] : span["end"]] == span["text"] != ""
            found += 1
    assert found > 20
    example = task.from_value(("Ann", "met", "Bob"), "1")
    features = task.encode([example], tagger.tokenizer)
    logits_TC = np.zeros((len(features.targets[0]), 3))
    logits_TC[features.targets[0] != UNLABELLED] = np.log([[0.05, 0.9, 0.05], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1]])
    (span,) = task.decode([example], features, [logits_TC])[0]["spans"]
    assert span["text"] == "Ann met" and span["score"] == pytest.approx(0.75), "its words' mean"
    words = tagger([("Ann", "met", "Bob")])[0]
    assert words["text"] == "Ann met Bob" and words["words"] == ["Ann", "met", "Bob"]


def test_a_model_sees_a_text_without_what_is_not_seen(tmp_path):
    """As `transformers` does; the characters of a span are those of the text as it was given."""
    task = Tag(labels=("O", "B-X", "I-X"), max_length=64)
    tagger = untrained(task, tmp_path)
    clean, text = (
        "ann met bob in a film .",
        "\ufeffa\u00adnn met \u200b\x00 bob\u200f in a fi\u00ad\u200blm\u2060 .",
    )
    ids = [
        task.encode([task.from_value(t, "1")], tagger.tokenizer).to_arrays()[0]["ids"].tolist()
        for t in (clean, text)
    ]
    assert ids[0] == ids[1] and tagger.tokenizer.unk_id not in ids[1]
    expected, got = tagger([clean, text])
    assert got["tags"] == expected["tags"] and len(got["spans"]) == len(expected["spans"]) > 0
    for ours, theirs in zip(got["spans"], expected["spans"]):
        assert text[ours["start"] : ours["end"]] == ours["text"]
        assert ours["text"][0].isprintable() and ours["text"][-1].isprintable()
        assert ours["score"] == theirs["score"]
    given = tagger([["ann", "\u00ad", "met"]])[0]
    assert len(given["tags"]) == 3, "a word that was given has a tag"


def test_texts_with_spans_are_judged_by_words_that_prediction_cuts(tmp_path):
    """The model's mistake of cutting elsewhere counts, and predictions are those for the bare text."""
    task = Tag(labels=("O", "B-X", "I-X"), max_length=64)
    tagger = untrained(task, tmp_path)
    texts = ["東京へ行く", "ann's film, bob-eve", "in thefilm 3.14"]
    marked = [[[0, 2, "X"]], [[0, 3, "X"], [12, 15, "X"]], [[6, 10, "X"]]]
    rows = [{"text": text, "entities": spans} for text, spans in zip(texts, marked)]
    result = evaluate(tagger, rows)
    assert [prediction["words"] for prediction in result.predictions] == [list(from_text(t).words) for t in texts]
    assert result.predictions == tagger(texts)
    perfect = [
        {**p, "spans": [{"start": a, "end": b, "type": kind} for a, b, kind in spans]}
        for p, spans in zip(result.predictions, marked)
    ]
    assert task.score(result.examples, perfect)["f1"] == 1.0
    whole_words = [dict(perfect[0]), dict(perfect[1]), dict(perfect[2])]
    whole_words[2]["spans"] = [{"start": 3, "end": 10, "type": "X"}]  # the word "thefilm"
    figures = task.score(result.examples, whole_words)
    assert figures["f1"] == figures["precision"] == figures["recall"] == 0.75
    report = task_report.make_report(replace(result, predictions=whole_words))
    assert "the: O → B-X; film: B-X → I-X" in task_report.to_text(report)


def test_long_sentences_are_tagged_as_windows_see_them(tmp_path):
    """Every word gets one tag, the one of the window that owns it."""
    tagger = untrained(Tag(labels=("O", "B-X", "I-X"), max_length=12), tmp_path)
    words = tuple((tiny_model.WORDS * 3)[:50])
    example = tagger.task.from_value(words, "1")
    features = tagger.task.encode([example], tagger.tokenizer)
    assert features.lengths.tolist() == [12] * 6 + [10]  # a new window of 10 tokens every 7
    prediction = tagger([words])[0]
    assert len(prediction["tags"]) == 50


def test_a_text_without_words_has_no_tags(tmp_path):
    tagger = untrained(Tag(labels=("O", "B-X", "I-X"), max_length=24), tmp_path)
    assert tagger(" ") == {"text": " ", "spans": [], "words": [], "tags": []}


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
def test_answers_map_back_to_the_exact_characters(tmp_path, kind):
    reader = untrained(Answer(max_length=20, stride=6, unanswerable=True), tmp_path)
    if kind == "sentencepiece":
        reader.tokenizer = train_sentencepiece([*STRANGE, "ann met bob the film"] * 20, 45)
    checked = 0
    for context in STRANGE:
        prediction = reader({"question": "who met ann?", "context": context})
        for candidate in prediction["nbest"]:
            assert context[candidate["start"] : candidate["end"]] == candidate["text"] != ""
            checked += 1
        assert context[prediction["start"] : prediction["end"]] == prediction["answer"]
        total = sum(candidate["score"] for candidate in prediction["nbest"])
        assert 0 < total < 1  # what is missing is the probability of "no answer"
    assert checked > 40


def test_an_answer_keeps_accents_and_vowel_signs_that_the_vocabulary_drops(tmp_path):
    """Of "e" and an accent of its own, a lower-case token is the e alone; of a Thai letter, it lacks the tone."""
    context = "cafe\u0301 a\u0308\u0323 เชียงใหม่ ann"
    reader = untrained(Answer(max_length=40, n_best=200), tmp_path)
    ends = {candidate["end"] for candidate in reader(("who?", context))["nbest"]}
    assert {5, 9, 19} < ends and not any(unicodedata.combining(context[end]) for end in ends - {len(context)})


@pytest.mark.parametrize("unanswerable", [False, True])
def test_a_context_in_which_the_tokenizer_sees_nothing_holds_no_answer(tmp_path, unanswerable):
    reader = untrained(Answer(max_length=20, unanswerable=unanswerable), tmp_path)
    prediction = reader({"question": "who?", "context": "\u200b\u200b"})
    assert (prediction["answer"], prediction["start"], prediction["end"], prediction["nbest"]) == ("", 0, 0, [])


@pytest.mark.parametrize("n_best", [5, 100])
def test_best_spans_are_those_of_a_search_of_all(n_best):
    task = Answer(n_best=n_best, max_answer=4)
    logits_T2 = np.random.default_rng(0).normal(size=(16, 2))
    offsets = np.array([(3 * n, 3 * n + 2) for n in range(40)], dtype=np.int32)
    place = _Place(base=5, window=Window(start=7, stop=17, own_start=9, own_stop=15), offsets=offsets)
    every = []
    for first in range(9, 15):  # only owned tokens may begin an answer
        for last in range(first, min(first + 4, 17)):  # which ends inside the window
            score = logits_T2[first - 7 + 5, 0] + logits_T2[last - 7 + 5, 1]
            every.append((float(score), 3 * first, 3 * last + 2))
    assert sorted(task._best_spans(logits_T2, place), reverse=True) == sorted(every, reverse=True)[:n_best]


def in_windows(tmp_path):
    """A question on a context of several windows: the task, the example, its features, and logits of 0."""
    reader = untrained(Answer(max_length=12, stride=5, unanswerable=True), tmp_path)
    example = reader.task.from_value(("who met ann?", "bob met ann and the film was dull and eve"), "1")
    features = reader.task.encode([example], reader.tokenizer)
    assert len(features) >= 2
    return reader.task, example, features, [np.zeros((length, 2)) for length in features.lengths]


def point_at_first(features, outputs, window: int, height: float) -> None:
    """Raises the first token that the window owns."""
    place = features.places[window]
    outputs[window][place.base + place.window.own_start - place.window.start] = height


def test_windows_are_compared_by_log_probabilities(tmp_path):
    """The surer of two windows wins, whatever the level of its logits; the question's tokens do not count."""
    task, example, features, outputs = in_windows(tmp_path)
    point_at_first(features, outputs, 0, 6.0)
    point_at_first(features, outputs, 1, 4.0)
    found = task.decode([example], features, outputs)[0]
    window = features.places[0].window
    others = window.stop - window.start  # the context's but one, and [CLS]: e^0 each
    assert found["start"] == 0
    assert found["nbest"][0]["log_probability"] == pytest.approx(2 * (6.0 - np.log(np.exp(6.0) + others)))
    outputs[0] += np.array([3.0, -7.0])
    outputs[1] += 50.0
    outputs[1][1 : features.places[1].base] = 500.0  # the question's
    again = task.decode([example], features, outputs)[0]
    assert [again[key] for key in ("answer", "start", "end")] == [found[key] for key in ("answer", "start", "end")]
    for key in ("score", "null_difference"):
        assert again[key] == pytest.approx(found[key])


def test_no_answer_is_what_every_window_says(tmp_path):
    """As in the original, the least of the windows' scores counts; and here each is normalised."""
    task, example, features, outputs = in_windows(tmp_path)
    point_at_first(features, outputs, 0, 6.0)
    for logits_T2 in outputs[1:]:
        logits_T2 -= 40.0  # as raw sums these were the least
    found = task.decode([example], features, outputs)[0]
    assert found["null_difference"] == pytest.approx(-12.0)  # in the first window, where [CLS] stands at 0


def test_targets_of_windows_point_at_the_answer(tmp_path):
    folder = tiny_model.make_model(tmp_path)
    tokenizer = load_tokenizer(folder)
    context = "the film was dull and the plot was bad but Ann likes the actor . " * 2
    start = context.index("Ann", 30)
    example = QuestionExample("1", "x", "who likes ?", context, (("Ann likes", start),))
    task = Answer(max_length=20, stride=5)
    features = task.encode([example], tokenizer)
    assert len(features) > 2
    held = 0
    for unit, (first, last) in enumerate(features.targets):
        ids = features.batch([unit]).tokens.input_ids_T.tolist()
        if (first, last) != (0, 0):
            held += 1
            assert ids[first : last + 1] == tokenizer.encode("Ann likes")
    assert 0 < held < len(features)


def test_a_window_that_holds_a_part_of_the_answer_points_at_its_first_token(tmp_path):
    """Wherever the answer lies, also with its first or last token at a window's border."""
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    context = "ann,met bob(and)eve-likes the film, but bob met eve; and ann likes the-plot"
    words = from_text(context.replace("-", " ")).offsets
    task, sizes = Answer(max_length=13, stride=4), set()
    for start, stop in [(a, b) for (a, _), (_, b) in zip(words, words[2:])]:
        example = QuestionExample("1", "x", "who?", context, ((context[start:stop], start),))
        features = task.encode([example], tokenizer)
        for (first, last), where in zip(features.targets, features.places, strict=True):
            window, base = where.window, where.base
            inside = [n for n, (a, b) in enumerate(where.offsets) if start <= a and b <= stop]
            whole = window.start <= inside[0] and inside[-1] < window.stop
            shift = base - window.start
            assert (first, last) == ((inside[0] + shift, inside[-1] + shift) if whole else (0, 0))
            sizes.add(len({*inside} & {*range(window.start, window.stop)}) / len(inside))
    assert sizes >= {0.0, 1.0} and len(sizes) > 3


def test_windows_of_a_question_without_answer_point_at_their_first_token(tmp_path):
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    example = QuestionExample("1", "x", "who likes ?", "the film was dull and the plot was bad . " * 3, ())
    features = Answer(max_length=20, stride=5).encode([example], tokenizer)
    assert len(features) > 2 and set(features.targets) == {(0, 0)}


def test_lengths_are_the_original_s_by_default():
    task = Answer()
    assert (task.max_length, task.max_question, task.stride) == (512, 64, 128)
    assert (task.max_answer, task.n_best) == (30, 20)


def test_questions_leave_half_of_the_input_to_the_context(tmp_path):
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    example = QuestionExample("1", "x", "who met ann and bob " * 10, "ann met bob and eve " * 4)
    features = Answer(max_length=16).encode([example], tokenizer)
    assert features.lengths.max() == 16 and features.truncated == 1
    assert features.places[0].base == 8 + 2


def test_null_threshold_decides(tmp_path):
    reader = untrained(Answer(max_length=32, unanswerable=True, null_threshold=1e9), tmp_path)
    question = {"question": "who met ann?", "context": "bob met ann"}
    answered = reader(question)
    assert answered["answer"] != ""
    assert [answer["id"] for answer in reader([question] * 3)] == ["1", "2", "3"]
    reader.task = Answer(max_length=32, unanswerable=True, null_threshold=-1e9)
    refused = reader(question)
    for below, answer in ((0.0, answered["answer"]), (1e-9, "")):  # only what exceeds it is refused
        reader.task = replace(reader.task, null_threshold=answered["null_difference"] - below)
        assert reader(question)["answer"] == answer
    assert refused["answer"] == "" and refused["nbest"][0]["text"] == answered["answer"]
    assert refused["score"] == pytest.approx(1 - sum(c["score"] for c in answered["nbest"]))
