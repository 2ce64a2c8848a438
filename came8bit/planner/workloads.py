"""Models that transformers and diffusers build from a config.json, ready to be traced.

Everything is built of fake tensors: there is no memory behind them. Code that a config.json may
come with is never run.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import UnknownModel
from .activations import Model, Parameter, Workload, in_short, note_of_left_out

Config = Mapping[str, Any]

#: Dropout of attention: kernels for GPUs draw it inside and keep nothing, those for CPUs keep
#: scores. With ``eager`` attention it is kept everywhere.
_ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
_CAPTION_TOKENS = 300  # of a text encoder, for diffusion models
_UNSHAPED = re.compile(r"MultipleChoice|ForPreTraining|NextSentence|Detection|Segmentation")


def from_config(config: Config, name: str, source: str) -> Model:
    """Return the model that ``config``, the contents of a config.json, describes.

    Args:
        config: with a ``model_type`` of transformers or a ``_class_name`` of diffusers.
        name: human-readable.
        source: human-readable; the class is added.

    Raises:
        UnknownModel: the library is not installed or does not know the model.
        ValueError: the model is quantized.
    """
    if config.get("quantization_config"):
        raise ValueError(
            "the configuration is that of a quantized model, which does not train as it is; give "
            "the one of the original model"
        )
    kind = config.get("model_type") or config.get("_class_name")
    what = f"a model of type {kind!r}" if kind else "a model without a model_type"
    diffusion = "_class_name" in config
    with _quiet():
        library = _library("diffusers" if diffusion else "transformers", what)
        cls, workload = (_of_diffusers if diffusion else _of_transformers)(library, config, what)
        try:
            with FakeTensorMode():
                built = workload.build(torch.float32, False, None)
        except Exception as error:  # whatever its class makes of sizes that make no sense
            said = in_short(error)
            raise UnknownModel(
                f"{library.__name__} {library.__version__} fails to build {cls.__name__} ({said}).",
                what,
            ) from error
    tables = {id(m.weight) for m in built.modules() if isinstance(m, nn.Embedding)}
    trained = [(n, p) for n, p in built.named_parameters() if p.requires_grad]
    frozen = [n for n, p in built.named_parameters() if not p.requires_grad]
    notes = []
    if frozen:
        notes.append(note_of_left_out(frozen))
    if not workload.has_loss:
        notes.append("It has no head: what the loss on top of it keeps is not counted.")
    workload.longest = _longest(built, config)
    return Model(
        name or cls.__name__,
        f"{source} ({cls.__name__} of {library.__name__} {library.__version__})",
        tuple(Parameter(n, tuple(p.shape), embedding=id(p) in tables) for n, p in trained),
        workload=workload,
        notes=tuple(notes),
    )


def _library(name: str, what: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise UnknownModel(f"{what} is built by {name}: pip install 'came8bit[cli]'.", what)
    library = importlib.import_module(name)
    library.logging.set_verbosity_error()
    return library


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say while they are loaded off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _longest(model: nn.Module, config: Config) -> int | None:
    """Return the length of the table of learned positions; ``None`` if there is none."""
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name)
    ]
    given = [_count(config, key) for key in ("max_position_embeddings", "n_positions")]
    return min([*tables, *filter(None, given)]) if tables else None


def _count(config: Config, key: str) -> int:
    """Return a number of ``config``, 0 where there is none."""
    value = config.get(key)
    return int(value) if isinstance(value, (int, float)) and value > 0 else 0


# --- transformers ---------------------------------------------------------------------------------


def _of_transformers(library: Any, config: Config, what: str) -> tuple[type, Workload]:
    kind, names = config.get("model_type"), config.get("architectures")
    version = f"transformers {library.__version__}"
    if not isinstance(kind, str) or kind not in library.CONFIG_MAPPING:
        raise UnknownModel(f"{version} does not know {what}.", what)
    if names is None:
        mapping = library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        names = [mapping[kind]] if kind in mapping else None
    if not isinstance(names, list) or len(names) != 1:
        raise UnknownModel(
            f"{version} knows the type {kind!r}, but architectures, which names the class, is "
            f"{names!r}.",
            what,
        )
    # Old conversions spell Llama as LLaMA.
    cls = getattr(library, str(names[0]).replace("LLaMA", "Llama"), None)
    if not (isinstance(cls, type) and issubclass(cls, library.PreTrainedModel)):
        raise UnknownModel(f"{version} has no class {names[0]!r} of type {kind!r}.", what)
    made: Any = cls
    settings = {**_TOKENS, **config, "use_cache": False}
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = (
            0  # classifiers look for padding; what the token is costs nothing
        )

    def make(dtype: torch.dtype, attention: str | None, **changes: float) -> Any:
        chosen = library.CONFIG_MAPPING[kind].from_dict({**settings, **changes})
        more = {} if attention is None else {"attn_implementation": attention}
        # Values of fake weights do not matter, and some initializers look at them.
        fake = isinstance(torch.empty(0), FakeTensor)
        initialization = importlib.import_module("transformers.initialization")
        with initialization.no_init_weights() if fake else nullcontext():
            model = made._from_config(chosen, dtype=dtype, **more)
        model.tie_weights()  # is left out with the initialization
        return model

    def build(dtype: torch.dtype, checkpointing: bool, attention: str | None) -> nn.Module:
        model = make(dtype, attention)
        dropped = [key for key in _ATTENTION_DROPOUT if getattr(model.config, key, 0)]
        if dropped and model.config._attn_implementation != "eager":
            model = make(dtype, attention, **dict.fromkeys(dropped, 0.0))
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it has another name in version 6
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return model  # type: ignore[no-any-return]

    has_loss = any(key in inspect.signature(made.forward).parameters for key in _LABELS)
    language = cls.__name__.endswith(
        ("LMHeadModel", "CausalLM", "MaskedLM", "ConditionalGeneration")
    )
    return cls, Workload(
        build,
        _text_or_image,
        _loss_of_transformers,
        vocabulary=_count(config, "vocab_size") if language else 0,
        checkpointing="model.gradient_checkpointing_enable({'use_reentrant': False})",
        has_loss=has_loss,
    )


_LABELS = ("labels", "start_positions")


def _text_or_image(
    model: nn.Module, batch: int, sequence: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the arguments of a model of transformers: its main input, and labels."""
    made: Any = model
    name, config, kind = made.main_input_name, made.config, type(model).__name__
    accepted = inspect.signature(made.forward).parameters
    if _UNSHAPED.search(kind):
        raise NotImplementedError(f"the inputs of {kind} are not known")
    whole = torch.ones(batch, dtype=torch.int64)
    if name == "input_ids":
        found = {name: torch.ones(batch, sequence, dtype=torch.int64)}
    elif name == "pixel_values":
        side = config.image_size
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        found = {name: torch.ones(batch, config.num_channels, *sides, dtype=dtype)}
    else:
        raise NotImplementedError(f"the input {name!r} of {kind} is not known")
    if "start_positions" in accepted:
        return {**found, "start_positions": whole, "end_positions": whole.clone()}
    if "labels" not in accepted:
        return found
    if re.search("ForSequenceClassification|ForImageClassification", kind):
        labels = whole.to(dtype) if config.num_labels == 1 else whole
    elif name == "input_ids":
        labels = torch.ones(batch, sequence, dtype=torch.int64)
    else:
        raise NotImplementedError(f"the labels of {kind} are not known")
    return {**found, "labels": labels}


def _loss_of_transformers(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with positions_are_unpacked():
        outputs = model(**inputs)
        loss: Tensor | None = getattr(outputs, "loss", None)
        return outputs[0].sum() if loss is None else loss


@contextmanager
def positions_are_unpacked() -> Iterator[None]:
    """Let transformers know that no sequences are packed into one.

    It looks at the values of positions for that, and where it cannot, it prepares a mask.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    with warnings.catch_warnings(), mock.patch.object(masking_utils, name, return_value=None):
        warnings.simplefilter("ignore")
        yield


# --- diffusers ------------------------------------------------------------------------------------


def _of_diffusers(library: Any, config: Config, what: str) -> tuple[type, Workload]:
    name = str(config["_class_name"])
    cls = getattr(library, name, None)
    if not (isinstance(cls, type) and issubclass(cls, library.ModelMixin)):
        raise UnknownModel(f"diffusers {library.__version__} has no class {name!r}.", what)
    made: Any = cls

    def build(dtype: torch.dtype, checkpointing: bool, attention: str | None) -> nn.Module:
        if attention is not None:
            raise NotImplementedError("a choice of attention for models of diffusers")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters cannot be converted
        try:
            model: nn.Module = made.from_config(dict(config))
        finally:
            torch.set_default_dtype(before)
        if checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        return model

    return cls, Workload(
        build, _noise, _loss_of_diffusers, checkpointing="model.enable_gradient_checkpointing()"
    )


def _noise(model: nn.Module, batch: int, sequence: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of a diffusion transformer: a latent image of ``sequence`` tokens."""
    made: Any = model
    config = made.config
    accepted = inspect.signature(made.forward).parameters
    height = next(n for n in range(math.isqrt(sequence), 0, -1) if sequence % n == 0)
    patch = config.get("patch_size") or 1
    sides = (height * patch, sequence // height * patch)
    keys = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
    width = next((config[key] for key in keys if config.get(key)), 0)
    found = {
        "hidden_states": torch.ones(batch, config.in_channels, *sides, dtype=dtype),
        "encoder_hidden_states": torch.ones(batch, _CAPTION_TOKENS, width, dtype=dtype),
        "timestep": torch.ones(batch, dtype=dtype),
        "class_labels": torch.ones(batch, dtype=torch.int64),
    }
    if config.get("guidance_embeds"):
        found["guidance"] = torch.ones(batch, dtype=dtype)
    return {key: value for key, value in found.items() if key in accepted}


def _loss_of_diffusers(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs).sample.pow(2).mean()
    return loss
