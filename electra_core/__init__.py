"""electra_core: ELECTRA, from pre-training to fine-tuned models in the Hub's layout.

The names below are imported when first used, so that `import electra_core` costs nothing. The folders list their
modules in their own `__init__.py`; what lies here, in reading order:

packing         batches: sequences laid end to end, without padding
masking         which positions are masked
encoder         embeddings and layers
electra         generator, discriminator, and the step of the paper
objectives      what the paper compares ELECTRA with
training        one step, and the loop around it
pretrain        from a prepared corpus to RUN

config          every setting, and the presets
sizes           what follows from them
initialisation  first values of all parameters
linear          products in the precision the processor is fastest at
adam            the original's
muon            the other optimizer
optim           parameter groups, rates, clipping
flops           counted in two ways
host_random     the kernels' random numbers, in NumPy

tokenizer       text to ids and back
marks           accents that are characters of their own
prepare         from text to a corpus
corpus          reads it
examples        makes examples of it
checkpoint      all that an exact resume needs

tasks           heads and losses
finetune        from labelled data to a model
predict         predictions and evaluation
metrics         of downstream tasks
model_dir       the Hub's directories, read and written
pretrained      models that read and write them

detect          which tokens were replaced
trace           one step in slow motion
demo            everything in minutes
cli             `electra`
errors          what the user can fix, in one line
version         which code this is
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
    from electra_core.conversion.convert_tf import convert_checkpoint
    from electra_core.conversion.onnx_export import export
    from electra_core.downstream.choices import Choose
    from electra_core.downstream.classify import Classify, Regress
    from electra_core.downstream.multilabel import MultiLabel
    from electra_core.downstream.named_tasks import choose_task
    from electra_core.downstream.squad import Answer
    from electra_core.downstream.tagging import Tag
    from electra_core.downstream.task_files import register_task
    from electra_core.errors import UserError
    from electra_core.finetuning.settings import FinetuneSettings
    from electra_core.labelled_data.columns import Columns
    from electra_core.packing import TokenBatch, from_padded, pack, to_padded
    from electra_core.pretrained import (
        Discriminator,
        Electra,
        Generator,
        MultipleChoice,
        QuestionAnswerer,
        SequenceClassifier,
        TokenClassifier,
    )
    from electra_core.pretraining.from_checkpoint import convert_run
    from electra_core.tokenizer import load_tokenizer

_HOME = {
    "PRESETS": "config",
    "EncoderConfig": "config",
    "PretrainConfig": "config",
    "Electra": "pretrained",
    "UserError": "errors",
    "TokenBatch": "packing",
    "from_padded": "packing",
    "pack": "packing",
    "to_padded": "packing",
    "Discriminator": "pretrained",
    "Generator": "pretrained",
    "MultipleChoice": "pretrained",
    "QuestionAnswerer": "pretrained",
    "SequenceClassifier": "pretrained",
    "TokenClassifier": "pretrained",
    "load_tokenizer": "tokenizer",
    "Answer": "downstream.squad",
    "Choose": "downstream.choices",
    "Classify": "downstream.classify",
    "Columns": "labelled_data.columns",
    "FinetuneSettings": "finetuning.settings",
    "MultiLabel": "downstream.multilabel",
    "Regress": "downstream.classify",
    "Tag": "downstream.tagging",
    "choose_task": "downstream.named_tasks",
    "convert_checkpoint": "conversion.convert_tf",
    "convert_run": "pretraining.from_checkpoint",
    "export": "conversion.onnx_export",
    "register_task": "downstream.task_files",
}

__all__ = [
    "PRESETS",
    "Answer",
    "Choose",
    "Classify",
    "Columns",
    "Discriminator",
    "Electra",
    "EncoderConfig",
    "FinetuneSettings",
    "Generator",
    "MultiLabel",
    "MultipleChoice",
    "PretrainConfig",
    "QuestionAnswerer",
    "Regress",
    "SequenceClassifier",
    "Tag",
    "TokenBatch",
    "TokenClassifier",
    "UserError",
    "choose_task",
    "convert_checkpoint",
    "convert_run",
    "export",
    "from_padded",
    "load_tokenizer",
    "pack",
    "register_task",
    "to_padded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
