"""What progress looks like on a terminal, in a log file, and when it is to be quiet."""

import io

import pytest

from electra_core.runs.progress import progress


def test_progress_lines_away_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("electra_core.runs.progress.SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with progress("reading", 2000, "B", stream=out) as bar:
        bar.update(500)
        bar.note(loss="1.5")
        bar.update(1500)
    lines = out.getvalue().strip().split("\n")
    assert lines[0].startswith("reading: 500/2.00k B, 25%, ") and lines[0].endswith(" left")
    assert lines[-1].startswith("reading: 2.00k/2.00k B, 100%, ") and lines[-1].endswith("loss 1.5")
    out = io.StringIO()
    with progress("reading", None, "B", stream=out, quiet=True) as bar:
        bar.update(1)
        bar.note(loss=1)
    assert out.getvalue() == ""


def test_warnings_are_shown_once_also_when_it_is_quiet() -> None:
    for quiet in (True, False):
        out = io.StringIO()
        with progress("reading", 1, stream=out, quiet=quiet) as bar:
            bar.say("warning: odd")
            bar.say("warning: odd")
        assert out.getvalue().count("warning: odd\n") == 1


def test_what_was_done_before_counts_for_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("electra_core.runs.progress.time.monotonic", lambda: next(clock, 10.0))
    out = io.StringIO()
    with progress("training", 200, "steps", before=100, stream=out) as bar:
        bar.update(50)
    line = out.getvalue().strip().split("\n")[-1]
    assert line == "training: 150/200 steps, 75%, 5.00 steps/s, 00:10 elapsed, 00:10 left"


def test_lines_are_ever_farther_apart_and_the_last_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("electra_core.runs.progress.time.monotonic", lambda: now)
    out = io.StringIO()
    hours = 24
    with progress("training", 3600 * hours, "steps", stream=out) as bar:
        for _ in range(3600 * hours // 5):
            now += 5
            bar.note(loss="1.5")
            bar.update(5)
    lines = out.getvalue().strip().split("\n")
    assert [line.split(", ")[3] for line in lines[:3]] == ["00:10 elapsed", "00:20 elapsed", "00:30 elapsed"]
    assert 150 < len(lines) < 250 and lines[-1] != lines[-2], "a line every 10 seconds would be 8,640"


def test_what_was_written_at_the_end_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("electra_core.runs.progress.SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with progress("reading", 1, stream=out) as bar:
        bar.update(1)
    assert out.getvalue().count("\n") == 1


def test_progress_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with progress("reading", 2000, "B", stream=out) as bar:
        bar.note(loss="1.5")
        bar.update(2000)
    assert "reading: 100%" in out.getvalue() and "2.00k/2.00k" in out.getvalue() and "loss=1.5" in out.getvalue()
    out = Terminal()
    with progress("reading", 200, "steps", before=100, stream=out) as bar:
        bar.update(50)
    assert "reading:  50%" in out.getvalue() and "reading:  75%" in out.getvalue()
