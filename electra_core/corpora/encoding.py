"""Turns documents into blocks of ids, in one process or several; the result does not depend on how many.

In all of our tokenizers, a text's ids are those of its words (runs without a space) laid end to end. Natural text
repeats its words, so each is encoded once and looked up from then on, with the ids of the tokenizer library alone
(tests compare them).
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np

from electra_core.corpora.sentences import split_document
from electra_core.corpora.shards import SPLITS, Block, token_dtype
from electra_core.errors import UserError, option
from electra_core.tokenizer import Tokenizer, tokenizer_from_json

MAX_SENTENCE_TOKENS = 128
CACHE_CHARACTERS = 4_000_000  # of cached words, about 100 MB; then the cache is emptied


class Document(NamedTuple):
    """A document on its way to the shards of a split."""

    split: int
    """Index into SPLITS."""
    lines: list[str]


Batch = list[Document]


class WordEncoder:
    """A tokenizer that caches words; names of special tokens in a text are read as ordinary characters."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = tokenizer_from_json(tokenizer_json).as_plain_text()
        self.dtype = token_dtype(self._tokenizer.vocab_size)
        self._ids: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, sentences: Sequence[str]) -> list[bytes]:
        """The ids of each sentence, as the bytes of an array of `dtype`."""
        words = [sentence.split(" ") for sentence in sentences]
        self._learn(set().union(*words))
        lookup = self._ids.__getitem__
        return [b"".join(map(lookup, sentence)) for sentence in words]

    def _learn(self, words: set[str]) -> None:
        if self._characters > CACHE_CHARACTERS:
            self._ids, self._characters = {}, 0
        unknown = list(words.difference(self._ids))
        for word, ids in zip(unknown, self._tokenizer.encode_batch(unknown)):
            self._ids[word] = np.array(ids, self.dtype).tobytes()
            self._characters += len(word)


def encode_documents(batch: Batch, encoder: WordEncoder, lines: str) -> list[Block]:
    """A block for each split. `lines`: see `split_document`."""
    split_up = [split_document(document.lines, lines) for document in batch]
    encoded = iter(encoder.encode([sentence for sentences in split_up for sentence in sentences]))
    tokens: list[list[bytes]] = [[] for _ in SPLITS]
    lengths: list[list[int]] = [[] for _ in SPLITS]
    counts: list[list[int]] = [[] for _ in SPLITS]
    for (split, _), sentences in zip(batch, split_up):
        before = len(lengths[split])
        for _ in sentences:
            ids = next(encoded)
            tokens[split].append(ids)
            lengths[split] += cut_lengths(len(ids) // encoder.dtype.itemsize)
        if len(lengths[split]) > before:
            counts[split].append(len(lengths[split]) - before)
    return [
        Block(b"".join(tokens[i]), np.array(lengths[i], np.int64), np.array(counts[i], np.int64))
        for i in range(len(SPLITS))
    ]


def cut_lengths(length: int) -> list[int]:
    """Splits a sentence's length into nearly equal lengths of at most MAX_SENTENCE_TOKENS; [] for 0."""
    pieces = -(-length // MAX_SENTENCE_TOKENS)
    return [length * (i + 1) // pieces - length * i // pieces for i in range(pieces)]


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, lines: str, workers: int
) -> Generator[list[Block], None, None]:
    """The blocks of each batch, in order. Few batches are in flight at a time, so memory stays bounded.

    Raises:
        UserError: a worker process died, most likely for want of memory.
    """
    if workers == 1:
        encoder = WordEncoder(tokenizer.to_json())
        yield from (encode_documents(batch, encoder, lines) for batch in batches)
        return
    # Spawned: processes forked from a program with threads (torch, tokenizers) may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer.to_json(), lines))
    running: deque[Future[list[Block]]] = deque()
    try:
        for batch in batches:
            with _ctrl_c_blocked():  # the pool starts its workers here, which inherit it
                running.append(pool.submit(_work, batch))
            while running and (len(running) > 2 * workers or running[0].done()):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process died, most likely out of memory; try fewer {option('workers')}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Delays Ctrl-C. Processes started inside never see it: it is for the main process, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[WordEncoder, str]  # set once in each worker process


def _start_worker(tokenizer_json: str, lines: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is one worker
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    _worker = (WordEncoder(tokenizer_json), lines)


def _end_with_main_process() -> None:
    """Ends a worker whose main process was killed; it would wait for work for ever."""
    if (main := parent_process()) is not None:
        main.join()
        os._exit(1)


def _work(batch: Batch) -> list[Block]:
    return encode_documents(batch, *_worker)
