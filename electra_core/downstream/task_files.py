"""task.json beside a fine-tuned model: what its outputs mean, and how its inputs are read.

A task is a frozen dataclass of plain values (`interface.py`); the file holds these and "kind". A directory from
the Hub has no such file; its task is then inferred from config.json.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from electra_core import model_dir
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag, as_iob
from electra_core.errors import UserError
from electra_core.hub.folder_files import read_json_object
from electra_core.hub.layout import MULTI_LABEL, REGRESSION, read_labels
from electra_core.labelled_data.columns import Columns, to_json
from electra_core.tasks import SequenceClassifier, TaskModel, TokenClassifier

log = logging.getLogger("electra_core")
Kind = TypeVar("Kind", bound=Task)
KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Classify, MultiLabel, Regress, Tag, Answer, Choose)}
"""The kinds that task.json may name: ours, and those of `register_task`."""
_OURS = tuple(KINDS.values())
LATER = {"positive_class": "", "threshold": None}
"""Fields that an earlier version lacked, at their defaults."""
TASK_FILE = "task.json"
SHORTEST = 8  # smallest allowed limit of tokens per sequence


def register_task(kind: type[Kind]) -> type[Kind]:
    """Makes a task of your own known by its `kind`: `load` and `evaluate` read its folders, and `choose_task` and
    `--task` know its name. A decorator, above `@dataclass(frozen=True)`; a class defined again replaces itself.

    Raises:
        ValueError: not a frozen dataclass derived from `Task`, or `kind` is no name, or another task's.
    """
    if not (isinstance(kind, type) and issubclass(kind, Task) and "__dataclass_params__" in vars(kind)):
        raise ValueError(
            f"kind: expected a class derived from Task, with @dataclass(frozen=True), got {kind!r:.80}"
        )
    name = getattr(kind, "kind", None)
    if not isinstance(name, str) or name != name.lower():
        raise ValueError(f"{kind.__name__}.kind: expected a name in lower case, got {name!r}")
    if not _is_same(KINDS.get(name, kind), kind):
        owner = f"{KINDS[name].__module__}.{KINDS[name].__qualname__}"
        raise ValueError(f"{kind.__name__}.kind: expected a name of its own, got {name!r}, {owner}'s")
    KINDS[name] = kind
    return kind


def check_registered(task: Task) -> None:
    """Raises ValueError for a task whose folder could not be opened, or only as another task's."""
    name = getattr(task, "kind", None)
    if name not in KINDS or not _is_same(KINDS[name], type(task)):
        raise ValueError(
            f"task: {type(task).__name__} is not registered, so its folder could not be opened; put "
            "@register_task above the class, and give it a `kind` of its own"
        )


def _is_same(kind: type[Task], other: type[Task]) -> bool:
    """Whether two classes are the same, one perhaps defined again (in a notebook)."""
    return (kind.__module__, kind.__qualname__) == (other.__module__, other.__qualname__)


def save_task(task: Task, directory: Path) -> None:
    """Writes task.json into a model directory."""
    text = json.dumps(task_to_json(task), indent=2, ensure_ascii=False)
    (directory / TASK_FILE).write_text(text + "\n", encoding="utf-8")


def load_task(directory: Path) -> Task:
    """The task described by task.json in a model directory or, without one, inferred from config.json.

    Raises:
        UserError: a damaged file, or not a model of a downstream task.
    """
    file = directory / TASK_FILE
    if not file.exists():
        return _guess_task(directory)
    return task_from_json(read_json_object(directory, TASK_FILE), str(file))


def _guess_task(directory: Path) -> Task:
    """The task of a directory written by another library, from its config.json."""
    config, raw = model_dir.load_config(directory)
    names = raw.get("architectures") or ["no architecture"]
    kind = next((kind for kind in _OURS if kind.model_class.architecture in names), None)
    if kind is None:
        raise UserError(f"{directory}: {names[0]} is not fine-tuned for a task; run electra finetune first")
    length = config.max_position_embeddings
    if kind in (Answer, Choose):
        return kind(max_length=length)
    labels = read_labels(raw, str(directory / "config.json"))
    if kind is Tag:
        return Tag(labels=as_iob(labels), max_length=length)
    if raw.get("problem_type") == MULTI_LABEL:
        return MultiLabel(labels=labels, max_length=length)
    if len(labels) == 1:
        return _regression(raw, directory, length)
    if raw.get("problem_type") == REGRESSION:
        raise UserError(
            f'{directory / "config.json"}: problem_type "{REGRESSION}" with {len(labels)} outputs; only one '
            "is supported"
        )
    return Classify(labels=labels, max_length=length)


def _regression(raw: dict[str, Any], directory: Path, length: int) -> Regress:
    """The task of a classifier with one output."""
    if raw.get("problem_type") != REGRESSION:
        log.warning(
            '%s: one output, and problem_type is not "%s": its value is given as it is; the pipelines of '
            "transformers apply a sigmoid",
            directory / "config.json",
            REGRESSION,
        )
    return Regress(scale=1.0, max_length=length)


def load_model(task: Task, directory: Path) -> TaskModel:
    """The model of a task's directory.

    Raises:
        UserError: no such directory, an encoder with other classes than those set here, or a task.json that does
            not fit the model.
    """
    model = model_dir.load(task.model_class, directory, same_classes=True)
    where, positions = directory / TASK_FILE, model.config.max_position_embeddings
    if not SHORTEST <= task.max_length <= positions:
        raise UserError(f"{where}: max_length: expected {SHORTEST} to {positions}, got {task.max_length}")
    wanted, got = len(model.labels), len(task.labels)
    if isinstance(model, (SequenceClassifier, TokenClassifier)) and wanted != got:
        raise UserError(f"{where}: labels: expected {wanted} as the model has, got {got}")
    return model


def task_to_json(task: Task) -> dict[str, Any]:
    """Plain values from which `task_from_json` makes the task again. Those of `LATER` have no entry: what was
    fine-tuned by an earlier version is resumed, and its tokens in the cache are found."""
    values = dataclasses.asdict(task)  # type: ignore[call-overload]
    for field in dataclasses.fields(task):  # type: ignore[arg-type]
        if field.name in LATER and values[field.name] == LATER[field.name] == field.default:
            del values[field.name]
    if isinstance(columns := getattr(task, "columns", None), Columns):
        values["columns"] = to_json(columns)
    return {"kind": task.kind, **values}


def task_from_json(fields: Any, where: str) -> Task:
    """The task that `task_to_json` described.

    Raises:
        UserError: an unknown kind or field, or a value of another type.
    """
    values = dict(fields) if isinstance(fields, dict) else {}
    name = str(values.pop("kind", ""))
    if name not in KINDS:
        raise UserError(
            f"{where}: kind: expected one of {', '.join(KINDS)}, got {name!r}; a task of your own needs "
            "@register_task"
        )
    labels = values.get("labels", [])
    if not isinstance(labels, (list, tuple)):
        raise UserError(f"{where}: labels: expected a value like (), got {labels!r:.80}")
    if not all(isinstance(label, str) for label in labels):
        raise UserError(f"{where}: labels: expected strings, got {labels!r:.80}")
    try:
        if isinstance(values.get("columns"), dict):
            values["columns"] = Columns(**_with_tuples(values["columns"]))
        task = KINDS[name](**_with_tuples(values))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: not the description of a task ({error})") from None
    kinds = get_type_hints(KINDS[name])
    for key in values:
        if not _fits(value := getattr(task, key), kinds[key]):
            usual = getattr(KINDS[name](), key)
            raise UserError(f"{where}: {key}: expected a value like {usual!r}, got {value!r:.80}")
        if (kinds[key] is int or key == "scale") and value <= 0:
            raise UserError(f"{where}: {key}: expected more than 0, got {value!r:.80}")
    return task


def _fits(value: Any, kind: Any) -> bool:
    """Whether a field of this type may hold the value; numbers are finite."""
    inner = get_args(kind)
    if dataclasses.is_dataclass(kind):
        fields = get_type_hints(kind).items()
        return type(value) is kind and all(_fits(getattr(value, key), of) for key, of in fields)
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return type(value) in (float, int) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values with tuples, as a task has them, for JSON's lists."""
    return {key: _as_tuple(value) for key, value in values.items()}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
