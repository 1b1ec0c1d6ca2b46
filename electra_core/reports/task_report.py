"""Reports what a fine-tuned model gets right and wrong on labelled data, as text, JSON and HTML.

For every task: the metrics, those of the best constant guess, and the worst mistakes (the most confident ones).
For classes also the confusion matrix, figures per class, the calibration of the probabilities, and what is gained
by answering only where the model is confident; for texts with several labels, figures per label and threshold;
for spans, figures per type.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from electra_core.downstream.interface import baseline
from electra_core.downstream.squad_metrics import f1_score
from electra_core.downstream.tagging import marks_spans, side_by_side
from electra_core.errors import UserError, printable, writing
from electra_core.metrics import per_class_metrics, positive_class, shown_name, span_metrics
from electra_core.predict import Evaluation
from electra_core.reports.class_report import class_tables
from electra_core.reports.multilabel_report import multilabel_tables
from electra_core.reports.pages import page
from electra_core.reports.report_tables import (
    Table,
    answered_table,
    calibration_table,
    label_table,
    short,
    table_of,
    text_or_pair,
    worst_table,
)
from electra_core.reports.widths import fitted, width_of

LINE_LENGTH = 100  # of a table's note
CELL_LENGTH = 60  # in the terminal, in all columns but the last


@dataclass(frozen=True)
class TaskReport:
    """The evaluation of one model on one set of data."""

    model: str
    data: str
    kind: str
    examples: int
    metrics: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    """Figures of the constant guess; empty if the task has none."""
    tables: list[Table] = field(default_factory=list)
    positive: str = ""
    """Of two classes the one that f1 and average_precision are of."""


def make_report(evaluation: Evaluation, model: str = "", data: str = "") -> TaskReport:
    """Analyses an evaluation; `model` and `data` are names for the title."""
    task, examples = evaluation.task, evaluation.examples
    guess = baseline(task, examples)
    constant = guess[1] if guess is not None else {}
    if task.kind == "qa":  # a constant guess has no threshold to choose
        constant = {name: value for name, value in constant.items() if not name.startswith("best_")}
    tables = _TABLES[task.kind](evaluation) if task.kind in _TABLES else []
    return TaskReport(model, data, task.kind, len(examples), evaluation.metrics, constant, tables, task.positive)


def _numbers(evaluation: Evaluation) -> list[Table]:
    truth = [float(example.label) for example in evaluation.examples]
    rows = sorted(
        (
            (e.place, t, p["value"], p["value"] - t, text_or_pair(e))
            for e, t, p in zip(evaluation.examples, truth, evaluation.predictions)
        ),
        key=lambda row: -abs(row[3]),
    )
    return [worst_table("Largest errors first.", ("line", "truth", "prediction", "error", "text"), rows)]


def _tags(evaluation: Evaluation) -> list[Table]:
    judged = [side_by_side(*pair) for pair in zip(evaluation.examples, evaluation.predictions)]
    truth, predicted = [tags for _, tags, _ in judged], [tags for _, _, tags in judged]
    labels = evaluation.task.labels
    if marks_spans(labels):
        spans = span_metrics(truth, predicted)[1]
        table = table_of("Per type", "Whole spans, counted as conlleval does.", spans)
    else:
        right, got = [[labels.index(tag) for tags in side for tag in tags] for side in (truth, predicted)]
        table = label_table("Per tag", "", per_class_metrics(right, got, labels), {*right, *got})
    return [table, _worst_sentences(evaluation)]


def _worst_sentences(evaluation: Evaluation) -> Table:
    rows = []
    for example, prediction in zip(evaluation.examples, evaluation.predictions):
        wrong = [
            f"{word}: {right} → {got}"
            for word, right, got in zip(*side_by_side(example, prediction))
            if right != got
        ]
        if wrong:
            rows.append((example.line, len(wrong), short("; ".join(wrong)), short(" ".join(example.words))))
    rows.sort(key=lambda row: -row[1])
    note = f"{len(rows)} of {len(evaluation.examples)} sentences have mistakes; most mistakes first."
    return worst_table(note, ("line", "wrong", "word: truth → prediction", "text"), rows)


def _answers(evaluation: Evaluation) -> list[Table]:
    rows = []
    for example, prediction in zip(evaluation.examples, evaluation.predictions):
        gold = [text for text, _ in example.answers]
        f1 = f1_score(gold, prediction["answer"])
        if f1 < 1:
            wanted = " | ".join(dict.fromkeys(gold)) or "(none)"
            texts = wanted, prediction["answer"] or "(none)", example.question
            rows.append((example.id or example.place, f1, prediction["score"], *map(short, texts)))
    rows.sort(key=lambda row: (row[1], -row[2]))
    columns = ("id", "f1", "score", "truth", "prediction", "question")
    note = (
        f"{len(rows)} of {len(evaluation.examples)} answers are not exact; lowest F1 first, then most confident."
    )
    return [worst_table(note, columns, rows)]


def _choices(evaluation: Evaluation) -> list[Table]:
    wrong = [
        (e.line, p["score"], short(e.text), short(e.choices[e.label]), short(p["text"]))
        for e, p in zip(evaluation.examples, evaluation.predictions)
        if e.label != p["choice"]
    ]
    wrong.sort(key=lambda row: -row[1])
    correct = [e.label == p["choice"] for e, p in zip(evaluation.examples, evaluation.predictions)]
    scores = [p["score"] for p in evaluation.predictions]
    note = f"{len(wrong)} of {len(correct)} are wrong; most confident first."
    columns = ("line", "score", "text", "truth", "prediction")
    return [
        calibration_table(scores, correct),
        answered_table(scores, correct),
        worst_table(note, columns, wrong),
    ]


_TABLES: dict[str, Callable[[Evaluation], list[Table]]] = {
    "classify": class_tables, "multilabel": multilabel_tables, "regress": _numbers, "tag": _tags, "qa": _answers,
    "choose": _choices,
}  # fmt: skip
"""The tables of each kind of task; a user's own kinds have none."""


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# ---- the three forms -------------------------------------------------------------------------------------


def to_json(report: TaskReport) -> dict[str, Any]:
    """Plain values: tables as lists of rows by column name, with all rows."""
    tables = {
        t.title.lower().replace(" ", "_"): [dict(zip(t.columns, row)) for row in t.rows] for t in report.tables
    }
    return {
        "model": report.model,
        "data": report.data,
        "task": report.kind,
        "examples": report.examples,
        "metrics": report.metrics,
        **positive_class(report.metrics, report.positive),
        "constant_guess": report.baseline,
        **tables,
    }


def to_text(report: TaskReport) -> str:
    """The report for the terminal."""
    lines = [f"{report.model} on {report.data}: {report.examples} examples", ""]
    lines += _aligned(*_metrics(report, ""))
    for table in _to_read(report):
        heading = table.title + (f" - {table.note}" if table.note else "")
        lines += ["", *textwrap.wrap(heading, LINE_LENGTH, subsequent_indent="  ")]
        lines += _aligned(table.columns, table.rows)
    return printable("\n".join(lines)) + "\n"


def _to_read(report: TaskReport) -> list[Table]:
    return [table.to_read() for table in report.tables if not table.only_data]


def _metrics(report: TaskReport, head: str) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of the metrics, with those of the constant guess if there is one; `head` is above names."""
    columns = (head, "model", "constant guess") if report.baseline else (head, "model")
    rows = [
        (shown_name(name, report.metrics, report.positive), value, report.baseline.get(name, ""))
        for name, value in report.metrics.items()
    ]
    return columns, [row[: len(columns)] for row in rows]


def _aligned(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    cells = [[*(short(cell, CELL_LENGTH) for cell in row[:-1]), *row[-1:]] for row in cells]
    widths = [max(width_of(row[i]) for row in cells) for i in range(len(columns))]
    words = [_holds_words(rows, i) for i in range(len(columns))]
    return [
        "  " + "  ".join(fitted(c, w, left=left) for c, w, left in zip(row, widths, words)).rstrip()
        for row in cells
    ]


def _holds_words(rows: Sequence[tuple[Any, ...]], column: int) -> bool:
    return any(isinstance(row[column], str) and row[column] for row in rows)


def to_html(report: TaskReport) -> str:
    """One self-contained page."""
    title = f"{report.model} on {report.data}"
    metrics = Table("", "", *_metrics(report, "metric"))
    compared = "<p>For comparison, those of the best constant guess.</p>" if report.baseline else ""
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lead">{report.examples:,} examples, task {report.kind}.</p></header>',
        f"<h2>Metrics</h2>{compared}",
        _html_table(metrics),
    ]
    for table in _to_read(report):
        parts.append(f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>{_html_table(table)}")
    return page(title, "\n".join(parts), styles=("task_report.css",))


def _html_table(table: Table) -> str:
    words = [_holds_words(table.rows, index) for index in range(len(table.columns))]
    head = "".join(_html_cell("th", name, left) for name, left in zip(table.columns, words))
    body = "".join(f"<tr>{_html_row(row, words, table.shaded)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _html_row(row: tuple[Any, ...], words: Sequence[bool], shaded: bool) -> str:
    total = sum(value for value in row if isinstance(value, int)) if shaded else 0
    cells = []
    for value, left in zip(row, words):
        share = value / total if total and isinstance(value, int) else None
        cells.append(_html_cell("td", _cell(value), left, share))
    return "".join(cells)


def _html_cell(tag: str, text: str, words: bool, share: float | None = None) -> str:
    style = ' class="words"' if words else ""
    if share is not None:
        style = f' class="shaded" style="--p:{share:.3f}"'
    return f"<{tag}{style}>{escape(text)}</{tag}>"


_FORMS: dict[str, Callable[[TaskReport], str]] = {
    ".html": to_html,
    ".json": lambda report: json.dumps(to_json(report), indent=2, ensure_ascii=False) + "\n",
    ".txt": to_text,
}


def check_name(path: Path | str) -> None:
    """Raises UserError if a report cannot have this name, so that it is known before the work and not after."""
    path = Path(path)
    if path.suffix not in _FORMS:
        raise UserError(
            f"{path}: expected a name that ends in .html, .json or .txt, got {path.suffix or 'no suffix'}"
        )
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written (no folder {path.parent})")


def write_report(report: TaskReport, path: Path | str) -> None:
    """Writes the report in the form that the file's suffix names: .html, .json or .txt.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    check_name(path)
    with writing(str(path)):
        path.write_text(_FORMS[path.suffix](report), encoding="utf-8", errors="backslashreplace")
