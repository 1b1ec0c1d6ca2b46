"""Pre-training runs: they learn, repeat bit for bit, survive interruption and damage, and say what is wrong.

The models are as small as models can be (1 layer, 16 wide, some 60 words), so a run of 8 steps takes less than
a second. Runs repeat bit for bit on one thread; the machine's own number of threads is put back afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from electra_core.batches import Batches
from electra_core.cli import main
from electra_core.corpus import Corpus, prepare
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.metrics_log import read_metrics
from electra_core.optim import ElectraAdam, build_optimizer
from electra_core.pretrain import pretrain
from electra_core.pretrain_setup import resolve_config
from electra_core.progress import progress
from electra_core.run_folder import read_config
from electra_core.run_state import FAILED, read_state
from electra_core.training import MOST_SKIPPED_STEPS, Diverged, StepResult, training_steps

WORDS = "the a cat dog sat ran on by mat door of red big old and saw it . , was in house tree king son".split()
SIZES: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
RUN: dict[str, Any] = {
    "steps": 8, "batch_size": 8, "max_length": 24, "warmup_steps": 2, "checkpoint_every": 4, "eval_every": 4,
    "eval_examples": 16, "log_every": 1, "precision": "fp32", "generator_hidden_size": 16,
    "generator_attention_heads": 1, "generator_intermediate_size": 32,
}  # fmt: skip
ORIGINAL = {"optimizer": "electra-adam", "embedding_init": "normal", "position_init": "normal"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_text(path: Path, seed: int = 0, documents: int = 120) -> Path:
    """Documents of sentences in which words come in a preferred order."""
    draw = random.Random(seed)
    lines = []
    for _ in range(documents):
        for _ in range(draw.randint(3, 8)):
            at, words = draw.randrange(len(WORDS)), []
            for _ in range(draw.randint(3, 9)):
                words.append(WORDS[at])
                at = (at + draw.choice((1, 1, 1, 2, 7))) % len(WORDS)
            lines.append(" ".join(words))
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_data(folder: Path, seed: int = 0) -> Path:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"bcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    prepare(
        [write_text(folder / "text.txt", seed)], folder / "data", tokenizer=folder / "vocab.txt", lines="sentence",
        heldout_fraction=0.1, progress=lambda title, total, unit: progress(title, total, unit, quiet=True),
    )  # fmt: skip
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("corpus"))


def train(data: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    sizes = SIZES | options.pop("sizes", {})
    settings: dict[str, Any] = {"model": "tiny", "quiet": True, "device": "cpu", **options}
    return pretrain(data, out, changes=RUN | (changes or {}), encoder_changes=sizes, **settings)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, never interrupted; the preset's Muon, counted words and local heads included."""
    out = tmp_path_factory.mktemp("base") / "run"
    train(data, out)
    return out


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    clock = {"tokens_per_second", "data_wait", "memory_mb", "mfu"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run / "metrics.jsonl")]


def regular_rows(run: Path) -> list[dict[str, float]]:
    """Without the evaluation that a run makes where it is stopped."""
    return [row for row in rows(run) if "loss" in row or row["step"] % RUN["eval_every"] == 0]


def state(run: Path, step: int = 8) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def assert_same_run(ours: Path, theirs: Path, step: int = 8) -> None:
    """Parameters, optimizer state, metrics and model directories, bit for bit."""
    one, two = state(ours, step), state(theirs, step)
    assert one.keys() == two.keys() and any(name.startswith("optimizer/") for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert regular_rows(ours) == regular_rows(theirs)
    for part in ("discriminator", "generator"):
        name = f"{part}/model.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


# It learns ----------------------------------------------------------------------------------------------------


def fit_one_batch(data: Path, steps: int, **changes: Any) -> tuple[list[StepResult], Electra, Any]:
    """The first batch over and over, with one seed: the same masks and dropout-free forward each time."""
    corpus = Corpus.open(data)
    sizes = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = RUN | ORIGINAL | {"steps": steps, "learning_rate": 5e-3, "tying": "none"} | changes
    encoder, config = resolve_config("tiny", settings, sizes, corpus)
    model = Electra(encoder, config)
    batch = Batches(corpus, config, torch.device("cpu"))(0)

    def loss_function(part: Any, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(part, seed=1)
        return output.loss, {"mlm": output.mlm_loss, "rtd": output.rtd_loss}

    results = list(
        training_steps(
            model, build_optimizer(model, config), loss_function, lambda step: batch, first_step=0, steps=steps,
            seed=0, clip_norm=1.0, schedule=lambda t: config.learning_rate,
        )
    )  # fmt: skip
    return results, model, batch[0]


def test_one_batch_is_learned_by_heart_by_the_generator(data: Path) -> None:
    results, _, _ = fit_one_batch(data, 150)
    first, last = (float(results[i].figures["mlm"]) for i in (0, -1))
    assert first > 3.0, "about log 55 = 4.0"
    assert last < 0.1 * first
    assert float(results[-1].figures["rtd"]) < 0.2 * float(results[0].figures["rtd"])


def test_one_batch_is_learned_by_heart_by_the_discriminator(data: Path) -> None:
    """With uniform draws that stay the same, so that there is always something replaced to find."""
    results, model, batch = fit_one_batch(data, 150, uniform_generator=True)
    first, last = (float(results[i].figures["rtd"]) for i in (0, -1))
    output = model(batch, seed=1)
    assert 0.05 < output.is_replaced_T.float().mean() < 0.25
    assert last < 0.1 * first
    assert torch.equal(output.rtd_logits_T > 0, output.is_replaced_T), "every token is judged rightly"


# It repeats ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(data: Path, base: Path) -> None:
    assert {path.name for path in base.iterdir()} >= {
        "config.toml", "metrics.jsonl", "checkpoints", "discriminator", "generator",
    }  # fmt: skip
    steps = [row["step"] for row in rows(base)]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8], "a row a step, and one per evaluation"
    figures = [value for row in rows(base) for name, value in row.items() if name != "warnings"]
    assert all(math.isfinite(value) for value in figures)
    evaluation = rows(base)[-1]
    changes, sizes = read_config(str(base / "config.toml"))
    corpus = Corpus.open(data)
    batches = Batches(corpus, resolve_config("tiny", changes, sizes, corpus)[1], torch.device("cpu"))
    seen = sum(part.tokens.num_tokens for step in range(8) for part in batches(step))
    assert evaluation["tokens"] == seen
    assert 0 <= evaluation["eval_rtd_auc"] <= 1 and evaluation["eval_mlm_loss"] > 0


def test_same_seed_same_run_bit_for_bit(data: Path, base: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "again")
    assert_same_run(tmp_path / "again", base)


def test_another_seed_another_run(data: Path, base: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "other", {"seed": 1, "steps": 1})
    assert rows(tmp_path / "other")[0]["loss"] != rows(base)[0]["loss"]


def test_the_resolved_configuration_gives_the_same_run(data: Path, base: Path, tmp_path: Path) -> None:
    """RUN/config.toml given back by --config, through the command line."""
    out, config = tmp_path / "run", str(base / "config.toml")
    arguments = ["pretrain", "--data", str(data), "--out", str(out), "--model", "tiny", "--config", config]
    assert main([*arguments, "--quiet", "--device", "cpu"]) == 0
    assert_same_run(out, base)
    assert (out / "config.toml").read_text() == Path(config).read_text()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parts_of_a_batch_add_up_to_the_whole(data: Path, tmp_path: Path, dropout: float) -> None:
    """accumulate 1, 2 and 4: the same examples, masks, draws and dropout, so the same losses up to rounding."""
    sizes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    curves = []
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        train(data, out, ORIGINAL | {"accumulate": accumulate, "steps": 5}, sizes=sizes)
        curves.append([row for row in rows(out) if "loss" in row])
    for curve in curves[1:]:
        for ours, whole in zip(curve, curves[0], strict=True):
            assert ours == pytest.approx(whole, rel=2e-4), f"step {whole['step']}"


def test_bf16_runs_and_is_about_the_same(data: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(data, tmp_path / precision, {"precision": precision, "steps": 3})
    fp32, bf16 = rows(tmp_path / "fp32"), rows(tmp_path / "bf16")
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=0.05) and bf16[0]["loss"] != fp32[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in state(tmp_path / "bf16", 3).values())


# It is interrupted --------------------------------------------------------------------------------------------


def stop_at(folder: Path, source: Path, step: int) -> Path:
    """A copy of a finished run as it was after `step` steps (its newest checkpoint is of that step)."""
    shutil.copytree(source, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder


@pytest.mark.parametrize("optimizer", ["muon", "electra-adam", "adamw"])
def test_resumed_equals_uninterrupted(data: Path, base: Path, tmp_path: Path, optimizer: str) -> None:
    """What the log says after the checkpoint was written is of a part that is done again: it is dropped."""
    changes = {"optimizer": optimizer}
    if optimizer == "muon":
        whole = base
    else:
        whole = tmp_path / "whole"
        train(data, whole, changes)
    run = stop_at(tmp_path / "run", whole, 4)
    result = train(data, run, changes, resume=True)
    assert result.steps == 8 and result.stopped_by is None
    assert_same_run(run, whole)


def test_resume_of_a_finished_run_changes_nothing(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    train(data, run, resume=True)
    assert_same_run(run, base)


def test_a_time_limit_saves_and_says_so(data: Path, base: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", max_minutes=0.0)
    assert (result.steps, result.stopped_by) == (1, "time limit")
    assert train(data, tmp_path / "run", resume=True).steps == 8
    assert_same_run(tmp_path / "run", base)


SLOW_RUN = """
import sys, time
from pathlib import Path
from electra_core import batches
from electra_core.cli import main
whole = batches.Batches.__call__
def slow(self, step):
    if step >= 5:
        Path(sys.argv[1]).touch()
        time.sleep(0.3)
    return whole(self, step)
batches.Batches.__call__ = slow
sys.exit(main(sys.argv[2:]))
"""


def test_sigterm_saves_and_exits_75_and_the_run_goes_on(data: Path, base: Path, tmp_path: Path) -> None:
    out, flag = tmp_path / "run", tmp_path / "flag"
    arguments = ["pretrain", "--data", str(data), "--out", str(out), "--model", "tiny", "--device", "cpu"]
    arguments += ["--config", str(base / "config.toml")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(flag), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not flag.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, complained = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, complained
    assert "SIGTERM" in said and "--resume" in said
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert "step-00000006" <= saved[-1] < "step-00000008", "in the middle, between two regular ones"
    assert main([*arguments, "--resume", "--quiet"]) == 0
    assert_same_run(out, base)


# It is damaged or mistaken ------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "state.safetensors").write_bytes(content)


def lose_the_tensors(path: Path) -> None:
    (path / "state.safetensors").unlink()


def spoil_the_record(path: Path) -> None:
    (path / "state.json").write_text('{"step": 8, "sha', encoding="utf-8")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_the_tensors, spoil_the_record])
def test_a_damaged_checkpoint_is_passed_over(
    data: Path, base: Path, tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    damage(run / "checkpoints" / "step-00000008")
    train(data, run, resume=True, quiet=False)
    captured = capsys.readouterr()
    assert "step-00000008: damaged" in captured.out + captured.err
    assert_same_run(run, base)


def test_no_intact_checkpoint_is_an_error_and_nothing_is_removed(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    for path in (run / "checkpoints").iterdir():
        flip_a_bit(path)
    with pytest.raises(UserError, match="no intact checkpoint"):
        train(data, run, resume=True)
    assert rows(run) == rows(base) and len(list((run / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        ({"learning_rate": 2e-3}, {}, "learning_rate was 0.001, is now 0.002"),
        ({"batch_size": 16, "seed": 3}, {}, "batch_size was 8, is now 16; seed was 0, is now 3"),
        ({"steps": 9}, {}, "steps was 8, is now 9"),
        ({}, {"hidden_dropout_prob": 0.2}, "hidden_dropout_prob was 0.1, is now 0.2"),
    ],
    ids=["rate", "two", "steps", "encoder"],
)
def test_another_configuration_cannot_go_on(
    data: Path, base: Path, tmp_path: Path, changes: dict, sizes: dict, said: str
) -> None:
    run = stop_at(tmp_path / "run", base, 4)
    with pytest.raises(UserError, match="cannot resume") as error:
        train(data, run, changes, sizes=sizes, resume=True)
    assert said in str(error.value)
    assert rows(run) == rows(base) and (run / "config.toml").read_text() == (base / "config.toml").read_text()


def test_other_data_cannot_go_on(base: Path, tmp_path: Path) -> None:
    run, other = stop_at(tmp_path / "run", base, 4), make_data(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"corpus .* is another one"):
        train(other, run, resume=True)


def test_how_a_run_is_watched_may_change(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 4)
    train(data, run, {"eval_every": 100, "log_every": 2, "checkpoint_every": 2, "accumulate": 2}, resume=True)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4, 6, 8, 8]


def test_going_on_from_a_pair_of_model_directories(data: Path, base: Path, tmp_path: Path) -> None:
    """Continued pre-training starts from both halves' weights: at a rate of 0 it ends with them."""
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "optimizer": "adamw"}
    pair = {"init_discriminator": base / "discriminator", "init_generator": base / "generator"}
    train(data, tmp_path / "more", still, **pair)
    for kind in ("discriminator", "generator"):
        before = load_file(base / kind / "model.safetensors")
        after = load_file(tmp_path / "more" / kind / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pair_of_other_words_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    """As many words in another order: everything fits, and means something else."""
    pair = {
        f"init_{kind}": shutil.copytree(base / kind, tmp_path / kind) for kind in ("discriminator", "generator")
    }
    words = (data / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    for file in pair["init_discriminator"].glob("tokenizer*.json"):
        file.unlink()
    vocabulary = pair["init_discriminator"] / "vocab.txt"
    vocabulary.write_text("\n".join([*words[:5], words[6], words[5], *words[7:]]), encoding="utf-8")
    with pytest.raises(UserError, match="another tokenizer than the corpus"):
        train(data, tmp_path / "run", **pair)
    assert not (tmp_path / "run").exists()
    vocabulary.unlink()  # without a tokenizer there is nothing to compare with
    train(data, tmp_path / "run", {"steps": 1}, **pair)


def test_an_occupied_folder_is_left_alone(data: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"not empty; --resume .* --overwrite"):
        train(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    train(data, tmp_path, {"steps": 1}, overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear", "a run replaces runs, not letters"
    train(data, tmp_path, overwrite=True)
    assert_same_run(tmp_path, base)


def test_old_checkpoints_are_removed_new_ones_kept(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", {"checkpoint_every": 1, "keep_checkpoints": 3, "steps": 5})
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"], "and nothing temporary"


# It diverges --------------------------------------------------------------------------------------------------


def steps_with_nan(bad: set[int], steps: int, poison: str) -> Iterator[tuple[StepResult, nn.Linear]]:
    """A linear model whose loss or gradient is NaN at the steps in `bad`."""
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = ElectraAdam(model.parameters())
    place = {"step": 0}

    def loss_function(batch: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (model(batch) ** 2).mean()
        if place["step"] in bad:
            # 0 * sqrt(0): the loss is fine, its gradient is 0 * inf.
            loss = loss * math.nan if poison == "loss" else loss + 0 * (model.weight - 0.5).abs().sum().sqrt()
        return loss, {}

    def batches(step: int) -> list[Tensor]:
        place["step"] = step
        return [torch.ones(2, 3)]

    for result in training_steps(
        model, optimizer, loss_function, batches, schedule=lambda t: 0.01, first_step=0, steps=steps, seed=0,
        clip_norm=1.0,
    ):  # fmt: skip
        yield result, model


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison: str) -> None:
    before, seen = torch.full((1, 3), 0.5), []
    for result, model in steps_with_nan({0, 1}, 5, poison):
        assert result.skipped == (result.step <= 2)
        assert torch.equal(model.weight.detach(), before) == result.skipped
        before = model.weight.detach().clone()
        seen.append(bool(torch.isfinite(model.weight).all()))
    assert seen == [True] * 5


def test_twenty_such_steps_in_a_row_end_the_run() -> None:
    run = steps_with_nan(set(range(3, 100)), 100, "loss")
    with pytest.raises(Diverged, match=f"{MOST_SKIPPED_STEPS} steps in a row"):
        done = [result.step for result, _ in run]
        raise AssertionError(done)
    interrupted = steps_with_nan(set(range(100)) - {19, 38}, 50, "loss")
    assert sum(result.skipped for result, _ in interrupted) == 48, "one good step begins the count anew"


def test_a_run_that_diverges_leaves_good_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Electra.forward

    def spoiled(self: Electra, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        bad = self.training and len(list((tmp_path / "run" / "checkpoints").glob("step*"))) > 0
        return dataclasses.replace(output, loss=output.loss * math.nan) if bad else output

    monkeypatch.setattr(Electra, "forward", spoiled)
    with pytest.raises(Diverged):
        train(data, tmp_path / "run", {"steps": 50})
    assert read_state(tmp_path / "run")["state"] == FAILED
    newest = state(tmp_path / "run", 20)
    assert all(tensor.isfinite().all() for tensor in newest.values()), "what is saved is from before"
    skipped = [row["skipped_steps"] for row in rows(tmp_path / "run") if "skipped_steps" in row]
    good = skipped.index(1)
    assert good >= 4 and skipped == [0] * good + [1] * 19, "the log says which steps were skipped"
