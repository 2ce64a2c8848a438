"""Shapes of a config.json that the planner does not know, from transformers' own class.

The class is built on the meta device, where parameters have shapes and no memory.  What its layers
keep for the backward stays unknown.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from came8bit import planner


def from_config(path: Path, unknown: planner.UnknownModel) -> planner.Model:
    """The model that transformers builds from the config.json at ``path``.

    Args:
        path: of the file; no code that it may come with is run.
        unknown: what the planner said of it; raised again, with a reason, where this does not help.

    Raises:
        UnknownModel: transformers is not installed, or does not know the model either.
    """
    if importlib.util.find_spec("transformers") is None:
        raise _still(unknown, "With transformers installed, its own classes are asked for shapes.")
    import transformers

    transformers.logging.set_verbosity_error()
    config = json.loads(path.read_text(encoding="utf-8"))
    kind, names = config.get("model_type"), config.get("architectures")
    version = f"transformers {transformers.__version__}"
    if not kind or kind not in transformers.CONFIG_MAPPING:
        raise _still(unknown, f"{version} does not know it either.")
    if not isinstance(names, list) or len(names) != 1:
        raise _still(
            unknown,
            f"{version} knows the type, but architectures, which names the class, is {names!r}.",
        )
    made = getattr(transformers, str(names[0]), None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise _still(unknown, f"{version} knows the type, but no class {names[0]!r}.")
    try:
        settings = transformers.CONFIG_MAPPING[kind].from_dict(config)
        with torch.device("meta"):
            built: torch.nn.Module = made(settings)
    except Exception as error:  # whatever its class makes of sizes that make no sense
        text = f"{version} fails to build {made.__name__} ({type(error).__name__}: {error})."
        raise _still(unknown, text) from error
    return _describe(built, f"{path} ({made.__name__} of {version}, without memory)", unknown)


def _still(unknown: planner.UnknownModel, why: str) -> planner.UnknownModel:
    return planner.UnknownModel(f"{unknown} {why}", unknown.what)


def _describe(built: Any, source: str, unknown: planner.UnknownModel) -> planner.Model:
    tables = {id(m.weight) for m in built.modules() if isinstance(m, torch.nn.Embedding)}
    parameters, frozen = [], []
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            shape, embedding = tuple(parameter.shape), id(parameter) in tables
            parameters.append(planner.Parameter(name, shape, embedding=embedding))
        else:
            frozen.append(name)
    notes = []
    if frozen:
        shown = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
        notes.append(f"{len(frozen)} tensors that do not train are left out: {shown}.")
    return planner.Model(
        type(built).__name__, source, tuple(parameters), notes=tuple(notes), unknown=unknown.what
    )
