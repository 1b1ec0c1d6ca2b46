"""Stores a healthy run's held-out figures as the reference that `electra status` compares other runs with.

python -m benchmarks.reference_curve METRICS.jsonl --text "what it saw" --out docs/reference_curves/NAME.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Keep the rows that hold an evaluation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("metrics", type=Path, help="a run's metrics.jsonl")
    parser.add_argument("--text", required=True, help="description of what the run was trained on, and how")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    lines = options.metrics.read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(str.strip, lines)) if "eval_mlm_loss" in row]
    command = f"python -m benchmarks.reference_curve METRICS --text {options.text!r} --out {options.out.name}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"text": options.text, "command": command, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
