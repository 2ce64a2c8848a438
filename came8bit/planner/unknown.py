"""The error of models whose layers the planner does not know."""

from __future__ import annotations

OTHER_WAY = (
    "Give the model's .safetensors file, its model.safetensors.index.json or the folder they are "
    "in: the shapes are read from their headers, whatever the architecture."
)


class UnknownModel(ValueError):
    """The model is not one that the planner knows; the message says which it knows.

    Attributes:
        what: the model in a few words, such as ``"a model of type 'mamba'"``.
    """

    def __init__(self, message: str, what: str = "this model") -> None:
        super().__init__(message)
        self.what = what
