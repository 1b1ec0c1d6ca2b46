"""Pre-training throughput beside `transformers`: tokens per second of whole optimizer steps.

    python -m benchmarks.bench_pretrain [--model small] [--batch 16] [--length 128] [--precision auto|bf16|fp32]
        [--their-precision bf16|fp32] [--keep-freed-memory ours|all] [--peers NAME...] [--rounds 5]
        [--out FILE.json]

`electra`  ours: `Electra` with the engine and the optimizer that `electra pretrain` uses on this device. On a GPU
           every step replays a CUDA graph; steps without graphs are timed as well ("ours, eager").
           theirs: ElectraForMaskedLM and ElectraForPreTraining of the same sizes with shared embeddings, a
           padding mask, a draw by the Gumbel trick at the masked positions, fused AdamW, clipping. Three ways,
           from what one finds on the web to what a careful user writes (`PEERS`): the generator's loss from
           `labels`, with logits and loss at every position; only the logits of the masked positions selected;
           only their hidden states selected, so that only these are projected on the vocabulary. The last also
           with the library's eager attention, which may be faster for short sequences on a CPU, and if `--peers`
           names them with encoders that torch.compile has compiled.
`mlm`      ours: objective "mlm" (BERT) at the discriminator's size. theirs: ElectraForMaskedLM of that size,
           which is BERT with embeddings that may be narrower than the layers, in the same ways but the second.

Both sides have dropout 0.1 and the same batches of full sequences (so there is nothing to gain from packing), with
token frequencies by Zipf's law; all data are prepared before timing. On a CPU every program runs in its own
process, so that none reuses memory that another freed. For Base each takes 4 GB; `--peers` runs only some. Like
`electra pretrain`, ours makes C's allocator keep freed memory. Theirs does so only with
`--keep-freed-memory all`; a user can have it through two environment variables (docs/results.md).
Before timing, both sides must give the same losses and the same gradient norm for the same weights, masks and
draws, in fp32 without dropout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, OwnProcess, Rounds, compare, interleave, timed, use_device, write_report
from benchmarks.kernel_report import in_a_line
from benchmarks.our_steps import OURS, OURS_EAGER, engine_steps, run_engine
from benchmarks.pretrain_peers import (
    BY_DEFAULT,
    PEERS,
    hub_model,
    hub_steps,
    padded_inputs,
    peers,
)
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.electra import Electra, PretrainOutput
from electra_core.execution.placement import autocast_context, keep_freed_memory, resolve_device, resolve_precision
from electra_core.hub.layout import hub_tensors
from electra_core.masking import mask_tokens
from electra_core.objectives import build_objective
from electra_core.packing import PretrainBatch, from_lengths

CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 999  # as in BERT's vocabulary
BATCHES = 8
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


def batches_like_text(
    vocab_size: int, batch: int, length: int, config: PretrainConfig, count: int = BATCHES
) -> list[PretrainBatch]:
    """Batches of `batch` sequences of `length` tokens each; the token of rank r has frequency ~ 1 / (r + 2.7)."""
    words = torch.Generator().manual_seed(0)
    ranks = torch.arange(vocab_size - min(FIRST_WORD, vocab_size // 2))
    frequencies = 1.0 / (ranks + 2.7)
    batches = []
    for index in range(count):
        ids_T = torch.multinomial(frequencies, batch * length, replacement=True, generator=words)
        ids_NS = (ids_T + vocab_size - len(ranks)).view(batch, length)
        ids_NS[:, 0], ids_NS[:, -1] = CLS, SEP
        tokens = from_lengths(ids_NS.flatten(), torch.zeros(batch * length, dtype=torch.int64), [length] * batch)
        batches.append(
            mask_tokens(
                tokens,
                range(index * batch, (index + 1) * batch),
                seed=0,
                mask_id=MASK,
                special_ids=[CLS, SEP, MASK],
                fraction=config.mask_fraction,
                max_predictions=config.max_predictions,
            )
        )
    return batches


# ---- the same mathematics --------------------------------------------------------------------------------


def check_same(
    config: EncoderConfig, pretrain: PretrainConfig, device: torch.device, chosen: Sequence[str] = BY_DEFAULT
) -> dict[str, float]:
    """Largest relative differences in fp32 without dropout, for the same weights, masks and draws.

    Args:
        chosen: which of `PEERS` to compare with.

    Raises:
        SystemExit: losses that differ by more than 1e-4, or gradient norms by more than 1e-3.
    """
    config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = batches_like_text(config.vocab_size, 2, min(48, config.max_position_embeddings), pretrain, 1)[0]
    batch, inputs = batch.to(device), {name: t.to(device) for name, t in padded_inputs(batch).items()}
    ours = build_objective(config, pretrain).to(device)
    output = ours(batch, 1)
    output.loss.backward()
    losses = [output.loss, output.mlm_loss, output.rtd_loss]
    pairs = {}
    for name in peers(pretrain, chosen):
        theirs = hub_model(config, pretrain, name).to(device)
        their_losses = losses_with_our_weights(ours, theirs, inputs, output, batch)
        pairs[name] = list(zip(losses, their_losses)), gradient_norm(ours), gradient_norm(theirs)
    differences = {
        "loss": largest(relative(a, b) for losses, _, _ in pairs.values() for a, b in losses),
        "gradient_norm": largest(relative(a, b) for _, a, b in pairs.values()),
    }
    if not (differences["loss"] <= LOSS_TOLERANCE and differences["gradient_norm"] <= GRADIENT_TOLERANCE):
        raise SystemExit(f"both sides do not compute the same: {differences}; nothing was timed")
    return differences


def checked(
    config: EncoderConfig, pretrain: PretrainConfig, device: torch.device, chosen: Sequence[str]
) -> tuple[list[str], dict[str, float]]:
    """`check_same` with one peer after the other: those that can run, and the largest differences.

    On a CPU all have to. A GPU may be there for minutes only: without the library, or with another version of it,
    ours is measured beside our own eager steps.

    Raises:
        SystemExit: as `check_same`.
    """
    found: dict[str, dict[str, float]] = {}
    for name in peers(pretrain, chosen):
        try:
            found[name] = check_same(config, pretrain, device, [name])
        except Exception as error:
            if device.type == "cpu":
                raise
            print(f"{name}: left out, cannot run: {in_a_line(error)}", flush=True)
    figures = dict.fromkeys(figure for differences in found.values() for figure in differences)
    return list(found), {figure: max(each[figure] for each in found.values()) for figure in figures}


def losses_with_our_weights(
    ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor], output: PretrainOutput, batch: PretrainBatch
) -> list[Tensor]:
    """Their losses with our weights and our draws; their gradients are left in place."""
    copy_weights(ours.generator, theirs.generator)  # type: ignore[arg-type]
    if isinstance(ours, Electra):
        copy_weights(ours.discriminator, theirs.discriminator)  # type: ignore[arg-type]
        losses = theirs(inputs, output.corrupted_ids_T[batch.masked_positions_M])
    else:
        losses = theirs(inputs)
    losses[0].backward()
    return list(losses)


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Our weights into the library's model, under the Hub's names; only tied copies may be missing."""
    missing, unexpected = theirs.load_state_dict(hub_tensors(ours), strict=False)
    missing = [name for name in missing if not name.startswith("generator_lm_head.") and "_ids" not in name]
    if missing or unexpected:
        raise SystemExit(f"weights do not match: missing {missing}, unexpected {unexpected}")


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients as one vector; shared parameters count once."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def largest(differences: Iterable[float]) -> float:
    """The largest, 0 of none; NaN if one of them is, which `max` tells only of the first."""
    return float(torch.tensor([0.0, *differences], dtype=torch.float64).max())


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; 0 for two zeros."""
    return float((a - b).detach().abs() / b.detach().abs().clamp(min=1e-30))


# ---- timing ----------------------------------------------------------------------------------------------


def measure(
    config: EncoderConfig,
    pretrain: PretrainConfig,
    batches: list[PretrainBatch],
    precisions: tuple[str, str],
    device: torch.device,
    rounds: int,
    steps: int,
    keep_freed: str = "ours",
    chosen: Sequence[str] = BY_DEFAULT,
    so_far: Callable[[list[Comparison]], object] = lambda _: None,
) -> list[Comparison]:
    """Tokens per second of one objective, ours compared with each of theirs.

    Args:
        so_far: called after every round with the comparisons of the rounds so far.
        precisions: "auto", "bf16" or "fp32", for ours and theirs.
        steps: optimizer steps of each program per round.
        keep_freed: "ours" or "all": which programs keep freed memory, on a CPU.
        chosen: which of `PEERS` to run.
    """
    threads = torch.get_num_threads()
    ours = (OURS, *([OURS_EAGER] if device.type == "cuda" else []))
    arguments = {
        name: (config, pretrain, batches, precisions[name not in ours], device, steps, threads, name, keep_freed)
        for name in (*ours, *peers(pretrain, chosen))
    }
    work = batches[0].tokens.num_tokens * steps

    def compared(seconds: Rounds) -> list[Comparison]:
        return compare(pretrain.objective, "tokens/s", work, seconds, OURS)

    def after_round(seconds: Rounds) -> None:
        so_far(compared(seconds))

    if device.type != "cpu":
        here = {name: program(*given) for name, given in arguments.items()}
        return compared(interleave(here, rounds, device, 1, after_round))
    programs = {name: OwnProcess(timed, program, *given) for name, given in arguments.items()}
    seconds = interleave(programs, rounds, device, 2, after_round)
    for running in programs.values():
        running.close()
    return compared(seconds)


def program(
    config: EncoderConfig, pretrain: PretrainConfig, batches: list[PretrainBatch], precision: str,
    device: torch.device, steps: int, threads: int, name: str, keep_freed: str = "ours",
) -> Callable[[], object]:  # fmt: skip
    """One of the programs, ready to take `steps` optimizer steps per call."""
    torch.set_num_threads(threads)
    use_device(device)
    dtype = resolve_precision(precision, device)
    autocast = autocast_context(device, dtype)
    loop: Iterator[object]
    if name not in PEERS:
        model = build_objective(config, pretrain).to(device)
        engine = run_engine(device, dtype, config) if name == OURS else "eager"
        loop = engine_steps(engine, model, batches, pretrain, device, autocast)
    else:
        if device.type == "cpu" and keep_freed == "all":
            keep_freed_memory()
        padded = [{key: t.to(device) for key, t in padded_inputs(batch).items()} for batch in batches]
        loop = hub_steps(hub_model(config, pretrain, name).to(device), padded, pretrain, autocast)
    return partial(take, loop, steps)


def take(items: Iterator[object], count: int) -> None:
    """Takes `count` items and drops them."""
    for _ in range(count):
        next(items)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="small", choices=sorted(PRESETS))
    parser.add_argument("--objectives", nargs="+", default=["electra", "mlm"], choices=["electra", "mlm"])
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument(
        "--precision", default="bf16", choices=["auto", "bf16", "fp32"], help="precision of our programs"
    )
    parser.add_argument(
        "--their-precision", choices=["bf16", "fp32"], help="precision of the others (default: the same)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps per program and round")
    parser.add_argument(
        "--keep-freed-memory", default="ours", choices=["ours", "all"], help="programs that keep freed memory"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(BY_DEFAULT),
        choices=list(PEERS),
        help="peers to compare with (default: those that are not compiled)",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    args = arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    device, preset = resolve_device(args.device), PRESETS[args.model]
    use_device(device)
    encoder = replace(preset.discriminator, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    precisions = args.precision, args.their_precision or args.precision
    print(f"electra-{args.model}, {args.batch} x {args.length}, {' against '.join(precisions)}, {device}")
    differences: dict[str, dict[str, float]] = {}
    comparisons: list[Comparison] = []

    def write(path: Path, more: list[Comparison]) -> None:
        facts = {name: value for name, value in vars(args).items() if name != "out"}
        write_report(path, [*comparisons, *more], device, settings=facts, relative_differences=differences)

    part = args.out.with_suffix(".part") if args.out else None
    for objective in args.objectives:
        pretrain = replace(preset.pretrain, objective=objective, batch_size=args.batch, max_length=args.length)
        batches = batches_like_text(encoder.vocab_size, args.batch, args.length, pretrain)
        chosen, differences[objective] = checked(encoder, pretrain, device, args.peers)
        counts = args.rounds, args.steps
        found = measure(
            encoder, pretrain, batches, precisions, device, *counts, args.keep_freed_memory, chosen,
            partial(write, part) if part else lambda _: None,
        )  # fmt: skip
        comparisons += found
        print(*found, sep="\n", flush=True)
    if part:
        write(args.out, [])
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
