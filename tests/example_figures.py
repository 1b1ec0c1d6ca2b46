"""How the examples of an epoch compare with the original's, by the length of documents: a table (seconds).

    python tests/example_figures.py

Made-up documents of lognormal length, sentences of about 20 tokens, examples of 128. The original's are those of
its rules as `original_examples.py` has them. `docs/deviations.md` quotes the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from original_examples import FIRST_WORD, make_corpus, original_examples, total, words_of

from electra_core.examples import Examples

LENGTH = 128
FULL = LENGTH - 1  # a last token may not have been worth a segment
MEANS = {100: 400_000, 300: 400_000, 800: 600_000, 5000: 1_500_000}
"""Tokens of a document, on average: tokens in all."""
Pair = tuple[Sequence[int], Sequence[int]]  # the words of two segments


def documents(mean: int, tokens: int) -> list[list[int]]:
    """Sentence lengths of each document."""
    draw, made, count = np.random.default_rng(mean), [], 0
    while count < tokens:
        size, sentences = max(5, int(draw.lognormal(np.log(mean) - 0.32, 0.8))), [0]
        while sum(sentences) < size:
            sentences.append(int(np.clip(draw.lognormal(np.log(20) - 0.18, 0.6), 2, LENGTH)))
        made.append(sentences[1:])
        count += sum(sentences)
    return made


def figures(pairs: Sequence[Pair], words: int) -> tuple[float, float, float]:
    """Percent of the examples that are full, and of the words that are in none and in several."""
    seen = np.zeros(words, dtype=int)
    for pair in pairs:
        for segment in pair:
            seen[np.asarray(segment, dtype=int) - FIRST_WORD] += 1
    full = np.mean([total(pair) >= FULL for pair in pairs])
    return 100 * float(full), 100 * float(np.mean(seen == 0)), 100 * float(np.mean(seen > 1))


def main() -> None:
    """Prints the table."""
    print("| tokens of a document, mean | full: the original's, ours | unread | read twice, ours |")
    print("|---|---|---|---|")
    for mean, tokens in MEANS.items():
        made = documents(mean, tokens)
        words = sum(map(sum, made))
        theirs = figures(original_examples(made, max_length=LENGTH), words)
        ours_of_epoch = Examples(make_corpus(made), LENGTH, seed=0)
        planned = ours_of_epoch.plan(range(len(ours_of_epoch.slots)))
        ours = figures([words_of(example) for example in planned], words)
        pairs = [f"{a:.1f}%, {b:.1f}%" for a, b in zip(theirs, ours)]
        print(f"| {mean:,} | {pairs[0]} | {pairs[1]} | {ours[2]:.1f}% |", flush=True)


if __name__ == "__main__":
    main()
