"""A finished pre-training run -> the `tiny` model in the package, in bf16, with its model card.

    python -m benchmarks.package_tiny RUN --data DATA ... --commit COMMIT --commands FILE --text "what it is"

Writes electra_core/tiny/discriminator and electra_core/tiny/generator, and next to them the run's configuration
(config.toml) and its evaluations on held-out text (curve.jsonl).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from benchmarks.harness import processor_name
from electra_core.corpus import Corpus
from electra_core.model_dir import load_discriminator, load_generator, save_pretrained
from electra_core.runs.metrics_log import read_metrics

TINY = Path(__file__).parent.parent / "electra_core" / "tiny"
SHOWN = ("eval_mlm_loss", "eval_mlm_accuracy", "eval_rtd_loss", "eval_base_rate_loss", "eval_rtd_auc")


def main() -> None:
    """Package one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="corpora it was trained on")
    parser.add_argument("--commit", required=True, help="commit of this repository that it was trained with")
    parser.add_argument("--text", required=True, help="what the corpus was made from")
    parser.add_argument("--commands", type=Path, required=True, help="the commands that made it, for the card")
    parser.add_argument("--precision", default="fp32", help="precision of the run")
    parser.add_argument("--threads", default="one thread")
    parser.add_argument("--results", type=Path, help="Markdown of fine-tuning results to add to the card")
    options = parser.parse_args()
    corpora = [Corpus.open(data) for data in options.data]
    curve = [row for row in read_metrics(options.run / "metrics.jsonl") if "eval_mlm_loss" in row]
    card = model_card(options, corpora, curve)
    TINY.mkdir(exist_ok=True)
    for model, kind in (
        (load_discriminator(options.run), "discriminator"),
        (load_generator(options.run), "generator"),
    ):
        shutil.rmtree(TINY / kind, ignore_errors=True)
        save_pretrained(model, TINY / kind, tokenizer=corpora[0].tokenizer, card=card, dtype=torch.bfloat16)
    shutil.copy(options.run / "config.toml", TINY / "config.toml")
    (TINY / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), encoding="utf-8")
    size = sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file())
    print(f"{TINY}: {size / 1e6:.2f} MB")


def model_card(options: argparse.Namespace, corpora: list[Corpus], curve: list[dict[str, float]]) -> str:
    """README.md of both directories: where the weights come from, and how good they are."""
    rows = [curve[i] for i in sorted({*range(0, len(curve), max(1, len(curve) // 8)), len(curve) - 1})]
    table = "\n".join(
        f"| {row['step']:,} | {row['tokens'] / 1e6:.1f} M | "
        + " | ".join(f"{row[name]:.4f}" for name in SHOWN)
        + " |"
        for row in rows
    )
    commands = "\n".join(
        "    " + line for line in options.commands.read_text(encoding="utf-8").strip().split("\n")
    )
    results = options.results.read_text(encoding="utf-8") if options.results else "Not yet measured.\n"
    return f"""---
library_name: electra-core
language: en
license: cc-by-sa-3.0
tags: [electra, replaced-token-detection]
---
# ELECTRA tiny

A small ELECTRA for looking at, for tests and for the demo: a discriminator of 4 layers, 128 wide; a generator of
1 layer, 32 wide; 8,192 lower-case words that both share. Far too small to compete with ELECTRA-Small; small
enough to be pre-trained on one CPU core in an hour.

## Where it comes from

{commands}
    python -m benchmarks.package_tiny RUN --data DATA …

- text: {options.text}
- training tokens: {", ".join(f"{c.num_tokens:,} (corpus fingerprint `{c.fingerprint[:16]}`)" for c in corpora)}
- commit `{options.commit}`, seed 0; every setting is in `config.toml` beside the two models
- {rows[-1]["step"]:,} steps; torch {torch.__version__}, {options.precision}, {options.threads},
  {processor_name()}; weights stored in bf16
- how the recipe was found: `docs/tiny_history.md`

## Held-out text during training

Losses in nats. A masked LM that knows frequencies and copying, but no context, would have an MLM loss of about
5.9. "base rate" is the entropy of the replaced fraction: the RTD loss of a discriminator that knows nothing.

| step | tokens | MLM loss | MLM accuracy | RTD loss | base rate | RTD AUC |
|---|---|---|---|---|---|---|
{table}

## Fine-tuned

{results}"""


if __name__ == "__main__":
    main()
