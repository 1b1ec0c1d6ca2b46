"""A model directory small enough for tests, and toy data that such a model learns in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

from electra_core.config import EncoderConfig
from electra_core.electra import Discriminator
from electra_core.initialisation import initialise
from electra_core.model_dir import save_pretrained
from electra_core.tokenizer import WordPieceTokenizer

WORDS = "the a film was is plot and but story actor scene . , ? who what met likes ann bob eve carl".split()
GOOD, BAD = "fine good great lovely".split(), "dull bad poor awful".split()
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def make_model(folder: Path, *, length: int = 64, dropout: float = 0.0) -> Path:
    """A pre-trained (that is, random) discriminator with a tokenizer of some eighty words."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *GOOD, *BAD, *LETTERS[1:]]
    vocab += ["##" + letter for letter in LETTERS]
    (folder / "vocab.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer.from_vocab(folder / "vocab.txt")
    config = EncoderConfig(
        vocab_size=len(vocab), embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=length, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = Discriminator(config)
    initialise(model, 0.1, seed=0)
    save_pretrained(model, folder, tokenizer=tokenizer)
    return folder


def reviews(path: Path, count: int, seed: int = 0) -> Path:
    """A TSV of sentences with one good or bad word among others; the label is which."""
    draw = random.Random(seed)
    rows = ["sentence\tlabel"]
    for index in range(count):
        words = draw.choices(WORDS[:11], k=draw.randint(2, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if index % 2 else BAD))
        rows.append(" ".join(words) + f"\t{'pos' if index % 2 else 'neg'}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def several_labels(path: Path, count: int, seed: int = 0) -> Path:
    """JSON lines: sentences with any of a good word, a bad word and a name, or none; the labels are which."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words, labels = draw.choices(WORDS[:11], k=draw.randint(2, 6)), []
        for label, of_it in (("praise", GOOD), ("blame", BAD), ("person", ["ann", "bob", "eve"])):
            if draw.random() < 0.4:
                words.insert(draw.randint(0, len(words)), draw.choice(of_it))
                labels.append(label)
        rows.append(json.dumps({"text": " ".join(words), "labels": labels}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def names_to_tag(path: Path, count: int, seed: int = 0) -> Path:
    """CoNLL columns: persons are PER, good words are begin and inside of PRAISE."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        lines = [f"{word} O" for word in draw.choices(WORDS[:11], k=draw.randint(1, 5))]
        lines.insert(draw.randint(0, len(lines)), f"{draw.choice(['Ann', 'Bob', 'Eve'])} I-PER")
        lines += [f"{word} I-PRAISE" for word in draw.choices(GOOD, k=draw.randint(0, 2))]
        sentences.append("\n".join(lines))
    path.write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences) + "\n", encoding="utf-8")
    return path


def questions(path: Path, count: int, seed: int = 0, *, unanswerable: bool = False) -> Path:
    """SQuAD JSON: "who is good?" asks for the name before "is good"; some contexts do not tell."""
    draw = random.Random(seed)
    paragraphs = []
    for index in range(count):
        name, word = draw.choice(["Ann", "Bob", "Eve", "Carl"]), draw.choice(GOOD)
        before = " ".join(draw.choices(WORDS[:11], k=draw.randint(1, 6)))
        hidden = unanswerable and index % 2 == 0
        context = f"{before} {'the actor' if hidden else name} is {word} and {before}"
        answers = [] if hidden else [{"text": name, "answer_start": context.index(name)}]
        qa = {"id": str(index), "question": f"who is {word}?", "answers": answers, "is_impossible": hidden}
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    return path


def choices(path: Path, count: int, seed: int = 0) -> Path:
    """JSON lines: of two or three endings the praising one is right."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        endings = draw.choices(BAD, k=draw.randint(1, 2))
        right = draw.randint(0, len(endings))
        endings.insert(right, draw.choice(GOOD))
        rows.append(json.dumps({"question": "the film is", "choices": endings, "label": right}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
