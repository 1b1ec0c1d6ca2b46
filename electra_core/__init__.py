"""electra_core: ELECTRA, from pre-training to fine-tuned models in the Hub's layout.

The names below are imported when first used, so that `import electra_core` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
    from electra_core.downstream.choices import Choose
    from electra_core.downstream.classify import Classify, Regress
    from electra_core.downstream.multilabel import MultiLabel
    from electra_core.downstream.named_tasks import choose_task
    from electra_core.downstream.squad import Answer
    from electra_core.downstream.tagging import Tag
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
    "from_padded",
    "load_tokenizer",
    "pack",
    "to_padded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
