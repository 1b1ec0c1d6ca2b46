"""A caller's function at every evaluation of a fine-tuning: it may stop it, and its errors lose nothing."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import pytest
from finetune_runs import SETTINGS, assert_same_end, data, model, train  # noqa: F401

from electra_core.predict import load
from electra_core.runs.notices import to_log
from electra_core.runs.state import read_state


class Pruned(Exception):
    """As Optuna's TrialPruned: raised by the caller's function, for the caller."""


@pytest.mark.parametrize("optimizer", ["electra-adam", "adamw"])
def test_a_caller_s_exception_at_an_evaluation_loses_nothing(model, data, tmp_path, optimizer):
    settings, before = replace(SETTINGS, optimizer=optimizer), threading.enumerate()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def prune(figures):
        if figures["step"] == 10:
            raise Pruned("trial 7")

    with pytest.raises(Pruned, match="trial 7"):
        train(model, data, tmp_path / "out", settings, on_evaluation=prune)
    assert threading.enumerate() == before, "what writes checkpoints has ended"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    told = read_state(tmp_path / "out")
    assert (told["state"], told["saved"]) == ("failed", 10) and "trial 7" in told["reason"]
    assert load(tmp_path / "out")("a fine film")["label"], "the best model so far"
    seen: list[str] = []
    train(model, data, tmp_path / "out", settings, resume=True, say=seen.append)
    assert "continuing at step 10" in seen
    train(model, data, tmp_path / "whole", settings)
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_true_for_an_evaluation_stops_and_it_goes_on(model, data, tmp_path, caplog):
    settings, seen = replace(SETTINGS, seeds=2), []

    def enough(figures):
        seen.append((figures["seed"], figures["step"]))
        return len(seen) in (2, 4, 9)

    report = train(model, data, tmp_path / "out", settings, on_evaluation=enough, say=to_log)
    assert report["stopped_by"] == "on_evaluation" and report["seeds"][0]["steps"] == 10
    assert (
        "stopped by on_evaluation; " in caplog.text and read_state(tmp_path / "out")["reason"] == "on_evaluation"
    )
    report = train(model, data, tmp_path / "out", settings, on_evaluation=enough, resume=True)
    assert report["stopped_by"] == "on_evaluation" and len(report["seeds"]) == 1, "between the seeds"
    report = train(model, data, tmp_path / "out", settings, on_evaluation=enough, resume=True)
    assert report["stopped_by"] is None and len(seen) == 8 and seen[-1] == (1, 20)
    train(model, data, tmp_path / "whole", settings)
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_at_the_last_evaluation_there_is_nothing_to_stop(model, data, tmp_path):
    settings = replace(SETTINGS, epochs=1, evaluations=1)
    assert train(model, data, tmp_path / "out", settings, on_evaluation=lambda _: True)["stopped_by"] is None
