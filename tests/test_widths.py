"""Tables in a terminal line up where Chinese letters take two columns and accents none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra
from electra_core.reports.status_views import to_terminal as status_shown
from electra_core.reports.task_report import TaskReport, to_text
from electra_core.reports.widths import fitted, width_of
from electra_core.runs.metrics_log import MetricsLog
from electra_core.runs.status import find_runs
from electra_core.tokenizer import WordPieceTokenizer
from electra_core.trace import trace
from electra_core.tracing.terminal import to_terminal

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] 北 京 大 学 ab ##c é 。".split()


def columns(text: str) -> str:
    """`text` with a second character behind every wide one, so that it has a character per column."""
    return re.sub("[一-龥。]", r"\g<0>_", text)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("plain", 5),
        ("北京。", 6),
        ("ｶﾀｶﾅ", 4),
        ("Zu\u0308rich", 6),
        ("हिन्दी", 5),
        ("한글", 4),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", 4),  # the same, each syllable in its letters
        ("السّلام", 6),
        ("zero\u200bwidth\ufeff", 9),
        ("", 0),
    ],
)
def test_width_of_a_text(text: str, width: int) -> None:
    assert width_of(text) == width
    assert width_of(fitted(text, 12)) == width_of(fitted(text, 12, left=False)) == 12
    assert fitted(text, 0) == text


def test_a_traces_candidates_line_up_and_its_lines_fit() -> None:
    config = EncoderConfig(
        vocab_size=len(WORDS), embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=80,
    )  # fmt: skip
    pair = PretrainConfig(
        model="tiny", generator_hidden_size=16, generator_attention_heads=1, generator_intermediate_size=24,
        generator_layers=1,
    )  # fmt: skip
    tokenizer = WordPieceTokenizer.from_tokens(WORDS)
    text = to_terminal(trace(Electra(config, pair), tokenizer, "北京大学。abc" * 8, seed=0), colour=False)
    assert max(len(columns(line)) for line in text.split("\n")) <= 100
    draws = [columns(draw).split("\n") for draw in re.split(r"position \d+: ", text) if "▇" in draw]
    for draw in draws:
        rows = [row for row in draw if "▇" in row]
        assert len({row.index("%") for row in rows}) == 1 and any("_" in row for row in rows), draw
    assert len(draws) > 4


def test_a_report_lines_up() -> None:
    report = TaskReport("模型", "数据", "classify", 1, {"f1 (北京大学)": 0.5, "accuracy": 0.25})
    rows = [columns(line) for line in to_text(report).split("\n") if "0.5" in line or "0.2" in line]
    assert len({len(row.split("0.")[0]) for row in rows}) == 1 and "大_学_" in rows[0]


def test_runs_beside_each_other_line_up(tmp_path: Path) -> None:
    runs = [tmp_path / ("北京大学" * 20), tmp_path / "北"]
    for run in runs:
        run.mkdir()
        log = MetricsLog(run)
        log.write(1, tokens=1234, loss=3.0)
        log.close()
    heads, *rows = map(columns, status_shown(find_runs(runs), None, [], 80).split("\n"))
    tokens = next(row for row in rows if row.startswith("tokens"))
    assert heads.rindex("北") == tokens.rindex("1,234") and "…" in heads and len(heads) <= 80
