"""Files that file managers leave in folders are nobody's data."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model
from small_corpora import OPTIONS, data, small_batches, text, tokenizer  # noqa: F401

from electra_core.conversion.convert_tf import _prefix
from electra_core.corpora.shards import Manifest
from electra_core.demo import _make_folder
from electra_core.errors import UserError
from electra_core.hub.weight_files import weights_digest
from electra_core.labelled_data.labelled import read_texts
from electra_core.predict import load
from electra_core.prepare import prepare
from electra_core.runs.folder import find_checkpoint

NAMES = (".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini", "._manifest.json")


def littered(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(b"\0\1")
    return folder


def test_a_corpus_is_replaced_with_them(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = littered(tmp_path / "out")
    prepare([text], out, tokenizer=tokenizer, **OPTIONS)  # as into an empty folder
    littered(out)
    options = {**OPTIONS, "heldout_fraction": 0.3}
    with pytest.raises(UserError, match="already holds a prepared corpus; overwrite replaces it"):
        prepare([text], out, tokenizer=tokenizer, **options)
    made = prepare([text], out, tokenizer=tokenizer, **options, overwrite=True)
    assert Manifest.read(out / "manifest.json") == made and not {*NAMES} & {path.name for path in out.iterdir()}
    (out / "Thumbs.db.txt").touch()
    with pytest.raises(UserError, match=r"holds more than a prepared corpus \(Thumbs.db.txt\)"):
        prepare([text], out, tokenizer=tokenizer, **OPTIONS, overwrite=True)


def test_a_folder_of_nothing_else_is_empty(tmp_path: Path) -> None:
    for resume in (False, True):
        assert find_checkpoint(littered(tmp_path / "run"), resume, False) is None
    _make_folder(littered(tmp_path / "demo"), overwrite=False)
    _make_folder(littered(tmp_path / "demo"), overwrite=True)


def test_a_model_is_the_same_with_them(tmp_path: Path) -> None:
    model = tiny_model.make_model(tmp_path / "model")
    before = weights_digest(model)
    (model / "._model.safetensors").write_bytes(b"\0\1")
    assert weights_digest(model) == before
    exported = littered(tmp_path / "exported")
    for name in ("._model.onnx", "model.onnx", "task.json"):
        (exported / name).touch()
    with pytest.raises(UserError, match=r"give its file .*/exported/model\.onnx$"):
        load(exported)
    for name in ("._model.ckpt.index", "model.ckpt.index"):
        (tmp_path / name).touch()
    assert _prefix(tmp_path) == tmp_path / "model.ckpt"


def test_a_folder_per_class_has_no_others(tmp_path: Path) -> None:
    for label in ("neg", "pos"):
        littered(tmp_path / label)
        for name in ("1.txt", "._1.txt"):
            (tmp_path / label / name).write_text(f"a {label} film")
    littered(tmp_path / "__MACOSX")
    assert [example.label for example in read_texts(littered(tmp_path))] == ["neg", "pos"]
