"""Exported graphs give torch's logits for every task and length, and predict through the same pipeline."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from electra_core.conversion import onnx_export
from electra_core.conversion.onnx_export import export
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import load_task, save_task
from electra_core.errors import UserError
from electra_core.initialisation import initialise
from electra_core.model_dir import load as load_model
from electra_core.model_dir import save_pretrained
from electra_core.predict import load
from electra_core.tokenizer import WordPieceTokenizer, load_tokenizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INPUTS = {
    "classify": ["a fine film", ("the plot", "was awful and dull"), "ann"],
    "multilabel": ["a fine film", ("the plot", "was awful and dull"), "ann"],
    "regress": ["a fine film", "ann met bob and eve ."],
    "tag": ["Ann met Bob", "the plot was awful " * 20],
    "qa": [("who met ann ?", "the film was dull and bob met ann " * 6), ("what ?", "ann")],
    "choose": [("the film is", ["good", "bad"]), ("ann", ["met bob", "likes the film", "is"])],
}
TASKS = [
    Classify(labels=("a", "b", "c"), max_length=32),
    MultiLabel(labels=("a", "b", "c"), max_length=32),
    MultiLabel(labels=("a",), max_length=32, threshold=0.1),
    Regress(scale=2.0, offset=1.0, max_length=32),
    Tag(labels=("O", "B-X", "I-X"), max_length=24),
    Answer(max_length=24, stride=8, unanswerable=True),
    Choose(max_length=32),
]


def make(task, folder: Path) -> Path:
    tiny_model.make_model(folder / "pretrained")
    config = load_model(task.model_class, folder / "pretrained", labels=task.labels).config
    model = task.model_class(config, task.labels)
    initialise(model, 0.5, seed=2)
    save_pretrained(model, folder / "model", tokenizer=load_tokenizer(folder / "pretrained"))
    save_task(task, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_every_task_predicts_the_same_through_onnxruntime(task, tmp_path):
    directory = make(task, tmp_path)
    difference = export(directory, tmp_path / "onnx/model.onnx")
    assert 0 < difference < 1e-5
    inputs = INPUTS[task.kind]
    expected, got = load(directory, precision="fp32")(inputs), load(tmp_path / "onnx/model.onnx")(inputs)
    assert_close(got, expected)


def test_a_graph_gives_the_number_though_its_folder_holds_the_scale_in_task_json(tmp_path):
    """As versions before 28 November 2026 wrote it: what reads the graph alone got a number of another scale."""
    directory, text = make(Regress(scale=2.0, offset=1.0, max_length=32), tmp_path), "a fine film"
    export(directory, tmp_path / "onnx/model.onnx")
    assert load_task(tmp_path / "onnx") == Regress(scale=1.0, offset=0.0, max_length=32)
    assert_close(load(tmp_path / "onnx/model.onnx")(text), load(directory, precision="fp32")(text))
    assert export(directory, tmp_path / "onnx/model.onnx") < 1e-5, "the folder holds the same model"


def assert_close(got, expected):
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_close(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=1e-4)
    else:
        assert got == expected


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    directory = make(TASKS[0], tmp_path)
    monkeypatch.setattr(onnx_export.Graph, "gelu", lambda graph, x: graph.node("Relu", x))
    with pytest.raises(UserError, match="not written; its logits differ"):
        export(directory, tmp_path / "onnx/model.onnx")
    assert not (tmp_path / "onnx").exists()


def test_lengths_are_free_and_named_as_on_the_hub(tmp_path):
    graph = onnx_export.build(load_model(TASKS[0].model_class, make(TASKS[0], tmp_path))).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    names = [dimension.dim_param for dimension in graph.input[0].type.tensor_type.shape.dim]
    assert names == ["batch", "length"]
    assert np.prod([d.dim_value or 1 for d in graph.output[0].type.tensor_type.shape.dim]) == 3


def test_the_file_says_what_its_outputs_are(tmp_path):
    import onnxruntime

    task = Classify(labels=("é", "b", "c"), max_length=32)
    export(make(task, tmp_path), tmp_path / "onnx/model.onnx")
    about = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx").get_modelmeta().custom_metadata_map
    assert (about["task"], json.loads(about["labels"]), about["max_length"]) == ("classify", ["é", "b", "c"], "32")
    beside = json.loads((tmp_path / "onnx/tokenizer_config.json").read_text("utf-8"))
    assert beside["model_max_length"] == 64, "the model's positions"


def test_the_pages_way_without_torch_gives_predicts_answers(tmp_path):
    """Also for texts beyond the model's positions, and for such as spell special tokens."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "service.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in block)
    export(make(TASKS[0], tmp_path), tmp_path / "onnx/model.onnx")
    texts = ["a fine film", "ann met [SEP] bob , [MASK] .", "the plot was awful " * 500]
    code += f"\nimport sys\nassert 'torch' not in sys.modules\nprint(json.dumps(classify({texts!r})))\n"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    expected = load(tmp_path / "onnx/model.onnx")(texts)
    assert_close(
        json.loads(run.stdout.splitlines()[-1]), [{k: p[k] for k in ("label", "score")} for p in expected]
    )


def test_models_do_not_share_a_folder_unless_their_task_is_the_same(tmp_path):
    one, other = make(TASKS[0], tmp_path / "one"), make(TASKS[1], tmp_path / "other")
    export(one, tmp_path / "onnx" / "one.onnx")
    export(one, tmp_path / "onnx" / "again.onnx")
    before = (tmp_path / "onnx" / "task.json").read_text()
    with pytest.raises(UserError, match=r"holds another model \((one|again).onnx\)"):
        export(other, tmp_path / "onnx" / "other.onnx")
    with pytest.raises(UserError, match=r"holds another model \(model.safetensors\)"):
        export(other, one / "other.onnx")
    assert (tmp_path / "onnx" / "task.json").read_text() == before
    assert not list(tmp_path.rglob("other.onnx"))
    export(other, other / "other.onnx")  # beside its own weights
    (tmp_path / "onnx" / "again.onnx").unlink()
    export(other, tmp_path / "onnx" / "one.onnx")  # in its place
    assert load(tmp_path / "onnx" / "one.onnx").task == TASKS[1]


def test_an_export_that_ends_early_leaves_the_earlier_one(tmp_path, monkeypatch):
    one, other = make(TASKS[0], tmp_path / "one"), make(TASKS[1], tmp_path / "other")
    export(one, tmp_path / "onnx" / "model.onnx")

    def contents():
        return {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir()}

    before = contents()
    for error, raised in ((OSError(28, "no space"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def full(*arguments, error=error):
            raise error

        monkeypatch.setattr(onnx_export, "save_task", full)
        with pytest.raises(raised):
            export(other, tmp_path / "onnx" / "model.onnx")
        assert contents() == before


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path):
    directory = make(TASKS[0], tmp_path)
    export(directory, tmp_path / "onnx/model.onnx")
    tokenizer = load_tokenizer(directory)
    more = WordPieceTokenizer.from_tokens([*tokenizer.tokens(range(tokenizer.vocab_size)), "zebra"])
    more.save(tmp_path / "onnx")
    with pytest.raises(UserError, match=r"model.onnx: vocabulary sizes differ: 87 in the tokenizer, 86 in the"):
        load(tmp_path / "onnx/model.onnx")
    proto = onnx.load(tmp_path / "onnx/model.onnx")
    del proto.metadata_props[:]  # as earlier versions wrote it
    onnx.save(proto, tmp_path / "onnx/model.onnx")
    with pytest.raises(UserError, match=r"model.onnx: vocabulary sizes differ: 87 in the tokenizer, fewer in the"):
        load(tmp_path / "onnx/model.onnx")
    more.save(directory)
    with pytest.raises(UserError, match="vocabulary sizes differ: 87 in the tokenizer, 86 in the model"):
        export(directory, tmp_path / "other/model.onnx")
    assert not (tmp_path / "other").exists()


def without_segments(graph):
    graph.input.remove(next(value for value in graph.input if value.name == "token_type_ids"))
    for node in graph.node:
        node.input[:] = ["input_ids" if name == "token_type_ids" else name for name in node.input]


def with_narrow_ids(graph):
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32


def with_another_output(graph):
    graph.output[0].name = graph.node[-1].output[0] = "other"


def with_logits_for_every_word(graph):
    last = [node for node in graph.node if node.op_type == "LayerNormalization"][-1]
    graph.node[-1].input[0] = last.output[0]
    del graph.output[0].type.tensor_type.shape.dim[:]


def with_no_numbers(graph):
    for constant in graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT and len(constant.dims) == 1:
            constant.raw_data = np.full(constant.dims, np.nan, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (without_segments, "the graph cannot be run .*token_type_ids"),
        (with_narrow_ids, "the graph cannot be run|not a model that onnxruntime can run"),
        (with_another_output, "the graph cannot be run .*logits"),
        (with_logits_for_every_word, r"logits: expected floats of shape \[1, 3\], got array"),
        (with_no_numbers, "damaged, its logits are not finite numbers"),
    ],
)
def test_graphs_of_something_else(tmp_path, change, message):
    file = tmp_path / "onnx/model.onnx"
    export(make(TASKS[0], tmp_path), file)
    proto = onnx.load(file)
    change(proto.graph)
    onnx.save(proto, file)
    with pytest.raises(UserError, match=f"model.onnx: ({message})"):
        load(file)


def test_a_text_that_the_graph_cannot_take(tmp_path):
    file = tmp_path / "onnx/model.onnx"
    export(make(TASKS[0], tmp_path), file)
    fields = json.loads((tmp_path / "onnx/task.json").read_text())
    (tmp_path / "onnx/task.json").write_text(json.dumps({**fields, "max_length": 1000}))
    predictor = load(file)
    predictor("ann met bob")
    with pytest.raises(UserError, match=r"model.onnx: the graph cannot be run"):
        predictor("the plot was awful " * 100)


def test_a_lack_of_memory_is_not_the_graphs_fault(tmp_path, monkeypatch):
    import onnxruntime

    def no_memory(*_, **__):
        raise MemoryError

    file = tmp_path / "onnx/model.onnx"
    export(make(TASKS[0], tmp_path), file)
    for method in ("run", "__init__"):
        monkeypatch.setattr(onnxruntime.InferenceSession, method, no_memory)
        with pytest.raises(MemoryError):
            load(file)


def test_users_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"expected task.json and the tokenizer beside it"):
        load(tmp_path / "model.onnx")
    (tmp_path / "task.json").write_text(json.dumps({"kind": "classify"}))
    with pytest.raises(UserError, match="not a model that onnxruntime can run"):
        load(tmp_path / "model.onnx")
    tiny_model.make_model(tmp_path / "pretrained")
    with pytest.raises(UserError, match="not fine-tuned"):
        export(tmp_path / "pretrained", tmp_path / "other.onnx")
