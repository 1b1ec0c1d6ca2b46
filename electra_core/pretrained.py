"""The six models with `from_pretrained` and `save_pretrained`, as users of the Hub know them, and the pair for
pre-training, whose halves are two of them.

They subclass the models of `electra` and `tasks`, which do no reading or writing; `model_dir` does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_core import electra, tasks
from electra_core.model_dir import load, save_pretrained

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained:
    """`from_pretrained` and `save_pretrained`, as users of the Hub know them."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """The model in a directory, run or Hub repository; options as for `load`."""
        return load(cls, source, **options)  # type: ignore[type-var]

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Writes a model directory; options as for the function `save_pretrained`."""
        save_pretrained(self, directory, **options)  # type: ignore[arg-type]


class Discriminator(Pretrained, electra.Discriminator):
    __doc__ = electra.Discriminator.__doc__


class Generator(Pretrained, electra.Generator):
    __doc__ = electra.Generator.__doc__


class Electra(electra.Electra):
    __doc__ = electra.Electra.__doc__
    generator_class, discriminator_class = Generator, Discriminator


class SequenceClassifier(Pretrained, tasks.SequenceClassifier):
    __doc__ = tasks.SequenceClassifier.__doc__


class TokenClassifier(Pretrained, tasks.TokenClassifier):
    __doc__ = tasks.TokenClassifier.__doc__


class QuestionAnswerer(Pretrained, tasks.QuestionAnswerer):
    __doc__ = tasks.QuestionAnswerer.__doc__


class MultipleChoice(Pretrained, tasks.MultipleChoice):
    __doc__ = tasks.MultipleChoice.__doc__
