"""Exports fine-tuned models to ONNX, for runtimes without PyTorch.

The graph is written node by node with `onnx.helper`: it is small, reads like the encoder, and no exporter has to
see through packed batches. Other runtimes expect rectangles, so its inputs are padded, and N and S are free:

    input_ids, attention_mask, token_type_ids    int64 [N, S]      mask 1 = token, 0 = padding
    logits                                       float32, by the model:
        SequenceClassifier [N, C], TokenClassifier [N, S, C], QuestionAnswerer [N, S, 2], MultipleChoice [N, 1]

The file's metadata hold the task, its labels, the maximum sequence length and the vocabulary's size (`describe`).

Left out on purpose: dropout, and half precision (runtimes have their own tools for that).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from electra_core import model_dir
from electra_core.conversion.onnx_model import INPUTS, columns_of, open_session
from electra_core.downstream.interface import Task
from electra_core.downstream.task_files import load_model, load_task, save_task
from electra_core.encoder import Encoder, Layer
from electra_core.errors import UserError, writing
from electra_core.files.clutter import entries
from electra_core.files.new_folder import temporary_folder
from electra_core.hub.layout import changed_classes
from electra_core.packing import from_padded, to_padded
from electra_core.tasks import ClassificationHead, MultipleChoice, SequenceClassifier, TaskModel
from electra_core.tokenizer import Tokenizer, load_tokenizer, matching_tokenizer

OPSET = 17  # the first with LayerNormalization
TOLERANCE = 1e-4  # largest allowed difference to torch's logits, relative to their size


class Graph:
    """An ONNX graph under construction; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor | np.ndarray) -> str:
        """Adds a weight or number."""
        from onnx import numpy_helper

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds an operation; with several outputs, returns a list of their names."""
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def linear(self, x: str, layer: nn.Linear) -> str:
        product = self.node("MatMul", x, self.constant(layer.weight.detach().T))
        return self.node("Add", product, self.constant(layer.bias))

    def norm(self, x: str, layer: nn.LayerNorm) -> str:
        weights = self.constant(layer.weight), self.constant(layer.bias)
        return self.node("LayerNormalization", x, *weights, axis=-1, epsilon=float(layer.eps))

    def gelu(self, x: str) -> str:
        """x Phi(x), with the error function, as everywhere in this project."""
        erf = self.node("Erf", self.node("Mul", x, self.number(1 / math.sqrt(2))))
        return self.node("Mul", self.node("Mul", x, self.number(0.5)), self.node("Add", erf, self.number(1.0)))


def _encoder(graph: Graph, encoder: Encoder) -> str:
    """The hidden states [N, S, D] from the graph's inputs."""
    embeddings = encoder.embeddings
    length = graph.node("Gather", graph.node("Shape", "input_ids"), graph.constant(np.array(1)), axis=0)
    positions = graph.node("Range", graph.constant(np.array(0)), length, graph.constant(np.array(1)))
    words = graph.node("Gather", graph.constant(embeddings.word_weight()), "input_ids")
    places = graph.node("Gather", graph.constant(embeddings.position_embeddings.weight), positions)
    types = graph.node("Gather", graph.constant(embeddings.token_type_embeddings.weight), "token_type_ids")
    hidden = graph.norm(graph.node("Add", graph.node("Add", words, places), types), embeddings.LayerNorm)
    if encoder.embeddings_project is not None:
        hidden = graph.linear(hidden, encoder.embeddings_project)
    padding = graph.node("Sub", graph.number(1.0), graph.node("Cast", "attention_mask", to=1))
    bias = graph.node("Mul", padding, graph.number(torch.finfo(torch.float32).min))
    bias_N11S = graph.node("Unsqueeze", bias, graph.integers(1, 2))
    for layer in encoder.layers:
        assert isinstance(layer, Layer)
        hidden = _layer(graph, layer, hidden, bias_N11S)
    return hidden


def _layer(graph: Graph, layer: Layer, hidden: str, bias_N11S: str) -> str:
    attention = layer.attention
    heads, width = attention.num_heads, attention.head_size
    parts = graph.node("Split", graph.linear(hidden, attention.qkv), outputs=3, axis=-1)
    split = graph.integers(0, 0, heads, width)
    q, k, v = (graph.node("Reshape", part, split) for part in parts)
    q = graph.node("Transpose", q, perm=[0, 2, 1, 3])
    k = graph.node("Transpose", k, perm=[0, 2, 3, 1])
    v = graph.node("Transpose", v, perm=[0, 2, 1, 3])
    scores = graph.node("Mul", graph.node("MatMul", q, k), graph.number(width**-0.5))
    weights = graph.node("Softmax", graph.node("Add", scores, bias_N11S), axis=-1)
    context = graph.node("Transpose", graph.node("MatMul", weights, v), perm=[0, 2, 1, 3])
    context = graph.node("Reshape", context, graph.integers(0, 0, heads * width))
    branch = graph.linear(context, attention.dense)
    hidden = graph.norm(graph.node("Add", branch, hidden), layer.attention_norm)
    branch = graph.linear(graph.gelu(graph.linear(hidden, layer.intermediate)), layer.output)
    return graph.norm(graph.node("Add", branch, hidden), layer.output_norm)


def _head(graph: Graph, model: TaskModel, hidden: str) -> str:
    """The name of the logits."""
    if model.per_token:
        layer = model.get_submodule(model.output_layer)
        assert isinstance(layer, nn.Linear)
        return graph.linear(hidden, layer)
    first = graph.node("Gather", hidden, graph.constant(np.array(0)), axis=1)
    if isinstance(model, MultipleChoice):
        return graph.linear(graph.gelu(graph.linear(first, model.sequence_summary.summary)), model.classifier)
    assert isinstance(model, SequenceClassifier)
    head: ClassificationHead = model.classifier
    return graph.linear(graph.gelu(graph.linear(first, head.dense)), head.out_proj)


def build(model: TaskModel) -> Any:
    """The model as an `onnx.ModelProto`, validated by the library.

    Raises:
        UserError: onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise UserError("exporting needs: pip install 'electra-core[onnx]'") from None
    graph = Graph()
    logits = _head(graph, model, _encoder(graph, model.encoder))
    graph.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    shape: list[Any] = ["batch", "length"] if model.per_token else ["batch"]
    columns = columns_of(type(model), len(model.labels))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in INPUTS]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, columns])]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "electra", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="electra-core",
    )
    onnx.checker.check_model(proto)
    return proto


def describe(proto: Any, task: Task, words: int) -> None:
    """Writes to the file's metadata what its outputs mean, for users who have only the graph.

    `task` is the task's kind, `labels` a JSON list in the order of the outputs, `max_length` the maximum number of
    tokens per sequence, [CLS] and [SEP] included, `vocab_size` the number of `words` that the model knows.
    """
    from onnx import helper

    labels = json.dumps(list(task.labels), ensure_ascii=False)
    numbers = {"max_length": str(task.max_length), "vocab_size": str(words)}
    helper.set_model_props(proto, {"task": task.kind, "labels": labels, **numbers})


def largest_difference(model: TaskModel, session: Any) -> float:
    """The largest difference between the graph's logits and torch's, relative to the largest logit.

    The batches have several shapes, including a single short sequence and sequences of unequal lengths.
    """
    random = np.random.default_rng(0)
    longest, worst = min(model.config.max_position_embeddings, 64), 0.0
    for lengths in ([3], [longest, 5], [7, 2, 9, longest // 2]):
        ids = random.integers(0, model.config.vocab_size, size=(len(lengths), max(lengths)))
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        types = random.integers(0, 2, size=ids.shape) * mask
        (got,) = session.run(["logits"], dict(zip(INPUTS, (ids, mask, types))))
        batch = from_padded(*(torch.from_numpy(array) for array in (ids, mask, types)))
        with torch.inference_mode():
            expected = model.eval()(batch)
        if model.per_token:
            expected, got = to_padded(expected, batch), got * mask[..., None]
        scale = float(expected.abs().max())
        worst = max(worst, float((expected - torch.from_numpy(got).view_as(expected)).abs().max()) / scale)
    return worst


def export(source: str | Path, file: str | Path) -> float:
    """Writes a fine-tuned model's graph with its tokenizer and task.json beside it, after checking its logits.

    Args:
        source: the model directory.
        file: `NAME.onnx`; its folder is created if necessary.

    Returns:
        The largest relative difference between onnxruntime's logits and torch's.

    Raises:
        UserError: `source` is not a fine-tuned model or has classes of its user's own, a library is missing, the
            file cannot be written or is not called NAME.onnx, the folder holds another model, or the difference is
            beyond `TOLERANCE` (then nothing is written).
    """
    directory, file = model_dir.find_model(source), Path(file)
    if file.suffix != ".onnx":  # `predict` recognises it by this
        raise UserError(f"{file}: expected a name that ends in .onnx")
    task = load_task(directory)
    model = load_model(task, directory)
    _refuse_own_classes(model, directory)
    tokenizer = matching_tokenizer(directory, model.config.vocab_size)
    # In folders from before 28 November 2026, a number's scale is in task.json, not in the last layer.
    with task.as_saved(model) as task:
        _refuse_company(file, directory, task, tokenizer)
        proto = build(model)
        describe(proto, task, model.config.vocab_size)
        content = proto.SerializeToString()
        difference = largest_difference(model, open_session(content))
    if not difference < TOLERANCE:
        raise UserError(f"{file}: not written; its logits differ from torch's by a relative {difference:.2g}")
    with writing(str(file)), temporary_folder(file) as new:  # each file is replaced whole
        (new / file.name).write_bytes(content)
        tokenizer.save(new, max_length=model.config.max_position_embeddings)
        save_task(task, new)
        for written in new.iterdir():
            written.replace(file.parent / written.name)
    return difference


def _refuse_own_classes(model: TaskModel, directory: Path) -> None:
    """Raises UserError for classes that the graph knows nothing of."""
    own = sorted({*changed_classes(model.encoder).values()})
    if not type(model).__module__.startswith("electra_core."):
        own.insert(0, type(model).__name__)
    if own:
        raise UserError(f"{directory}: only this package's classes can be exported, got {', '.join(own)}")


def _refuse_company(file: Path, directory: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Raises UserError if the folder holds another model, which would then be read with these files."""
    folder = file.parent
    others = [path for suffix in ("onnx", "safetensors", "bin") for path in entries(folder, f"*.{suffix}")]
    others = [other for other in others if other.name != file.name]
    if not others or folder.resolve() == directory.resolve():
        return
    try:
        same = load_task(folder) == task and load_tokenizer(folder).to_json() == tokenizer.to_json()
    except UserError:
        same = False
    if not same:
        raise UserError(f"{folder}: holds another model ({others[0].name}); write the graph to another folder")
