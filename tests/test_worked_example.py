"""docs/worked_example.py does what docs/worked_example.md says, here with a tiny model on toy reviews."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tiny_model

from electra_core.predict import load

SCRIPT = Path(__file__).parents[1] / "docs/worked_example.py"


def test_the_script_trains_saves_and_prints_the_test_accuracy(tmp_path):
    for split, count, seed in (("train", 60, 0), ("test", 20, 1)):
        rows = tiny_model.reviews(tmp_path / "rows.tsv", count, seed).read_text().rstrip("\n").split("\n")[1:]
        for index, row in enumerate(rows):
            text, label = row.split("\t")
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}_7.txt").write_text(text)
    model = tiny_model.make_model(tmp_path / "model")
    command = [sys.executable, SCRIPT, model, tmp_path / "aclImdb", tmp_path / "out"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = re.fullmatch(r"Test Accuracy: (\d\.\d{4})\n", result.stdout)
    assert printed and 0 <= float(printed[1]) <= 1
    assert set(load(tmp_path / "out")("a fine film")["scores"]) == {"neg", "pos"}
