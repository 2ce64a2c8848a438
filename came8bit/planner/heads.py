"""What stands on the layers of a model of transformers, told by the class that config.json names.

A causal language model has an output layer as wide as the vocabulary, a classifier a narrow one,
and a bare model none; the layers below are the same.  Classes that add something else are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import OTHER_WAY, UnknownModel
from .model import Parameter, weight_and_bias

#: ``model_type`` -> how the names of its classes begin.
_STEMS: dict[str, tuple[str, ...]] = {
    "llama": ("Llama",),
    "mistral": ("Mistral",),
    "qwen2": ("Qwen2",),
    "qwen3": ("Qwen3",),
    "gemma": ("Gemma",),
    "gemma2": ("Gemma2",),
    "gemma3_text": ("Gemma3", "Gemma3Text"),
    "phi3": ("Phi3",),
    "olmo2": ("Olmo2",),
    "granite": ("Granite",),
    "smollm3": ("SmolLM3",),
    "gpt2": ("GPT2",),
    "gpt_neox": ("GPTNeoX",),
}
#: How they end -> what that is.
_ENDS = {
    "ForCausalLM": "language",
    "LMHeadModel": "language",
    "Model": "bare",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
_OWN_CLASSIFIER = ("gpt2", "gpt_neox")  # their token classifiers are not the generic one


@dataclass(frozen=True)
class Head:
    """What takes the place of a language model's output layer.

    Attributes:
        labels: numbers per token that it makes; 0 for a bare model, which has no head.
        module: name of the layer.
        bias: whether it has one.
        dropout: whether there is dropout before it.
    """

    labels: int = 0
    module: str = "score"
    bias: bool = False
    dropout: bool = False

    def on(self, below: Sequence[Parameter], prefix: str, width: int) -> list[Parameter]:
        """All parameters: of the layers ``below``, whose names begin with ``prefix``, and its own.

        A bare model's are not those of a submodule, so they lack the prefix.
        """
        if not self.labels:
            return [replace(one, name=one.name.removeprefix(prefix)) for one in below]
        shape = (self.labels, width)
        return [*below, *weight_and_bias(self.module, shape, self.labels * self.bias, "head")]


def head_of(config: Mapping[str, Any]) -> Head | None:
    """The head that ``architectures`` asks for; ``None``: the output layer of a language model.

    That is also what a file without ``architectures`` is taken for.

    Raises:
        UnknownModel: another class, or several.
        ValueError: the number of labels is none.
    """
    named = config.get("architectures")
    if not named:
        return None
    kind = str(config.get("model_type"))
    what = _ends(kind, named)
    if what is None:
        shown = ", ".join(map(str, named)) if isinstance(named, list) else repr(named)
        stem = _STEMS[kind][-1]
        raise UnknownModel(
            f"got architectures {shown} of type {kind!r}; of this type, the planner knows the "
            f"language model, {stem}Model, {stem}ForSequenceClassification and "
            f"{stem}ForTokenClassification. {OTHER_WAY}",
            f"a {shown}",
        )
    if what == "language":
        return None
    if what == "bare":
        return Head()
    labels = _labels(config)
    if what == "sequence":
        return Head(labels)
    dropout = [config.get(key) for key in ("classifier_dropout", "hidden_dropout")]
    given = next((float(value) for value in dropout if value is not None), 0.1)
    own = kind in _OWN_CLASSIFIER
    return Head(
        labels,
        module="classifier" if own else "score",
        bias=own or bool(config.get("token_classification_bias", True)),
        dropout=given > 0,
    )


def _ends(kind: str, named: object) -> str | None:
    """What the one class in ``named`` is; ``None`` if it is not one of ``kind`` that is known."""
    if not isinstance(named, list) or len(named) != 1:
        return None
    # Old conversions spell Llama as LLaMA.
    name = str(named[0]).lower()
    for stem in _STEMS[kind]:
        for end, what in _ENDS.items():
            if name == f"{stem}{end}".lower():
                return what
    return None


def _labels(config: Mapping[str, Any]) -> int:
    """How many: transformers writes their names, and nothing if there are two."""
    names = config.get("id2label")
    count = config.get("num_labels", 2) if names is None else names
    count = len(count) if isinstance(count, Mapping) else count
    if type(count) is not int or count < 1:
        raise ValueError(f"the configuration gives {count!r} labels, expected at least 1")
    return count
