"""State dicts that ``torch.save`` wrote: those of came-pytorch 0.1.3, and those of this package.

The statistics of came-pytorch are those of the batched last-two view, in another shape;
``rms_ratio`` starts again, which changes nothing but the point around which the instability is
summed; ``RMS`` is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..state.layout import COUNTERS, plan
from ..state_dict.values import as_count, names_of
from ..validation import FORMAT_VERSION
from .archive import Archive, StoredTensor, explained
from .format import Entry, Span, find_layout, label, place

_LARGEST_OPTION = 4096  # bytes of a tensor among the options
_DEEPEST = 50
_MOST_VALUES = 100_000  # in the options of all groups together

_OFFICIAL = {"optim_bits": 32, "factored_view": "last_two", "format_version": FORMAT_VERSION}
_OPTIONS = {"lr", "betas", "eps", "clip_threshold", "weight_decay"}
_FACTORED = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TorchFile:
    """See :class:`.reader.Source`.

    Raises:
        CheckpointError: it is not the state dict of came-pytorch or came8bit, or a damaged one.
    """

    kind: str
    groups: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    strangers: Sequence[str]
    user: Mapping[str, str] = {}

    def __init__(self, file: BinaryIO, nbytes: int) -> None:
        self.nbytes = nbytes
        self.versions: Mapping[str, Any] = {"format": None, "came8bit": None}
        self._states: list[Mapping[str, Any]] = []
        self._archive = Archive(file)
        table = self._archive.load()
        if not _is_optimizer(table):
            raise _other_contents(table)
        with explained("the state dict makes no sense"):
            self._read(table)

    def read(self, position: int) -> dict[str, Tensor]:
        """Return the state of one parameter, as this package keeps it."""
        entry, saved = self.entries[position], self._states[position]
        layout = entry.layout
        if entry.step is None:
            return {}
        if layout is None:
            counts = {name: torch.tensor(saved[name]) for name in COUNTERS}
            return {**{name: self._archive.read(saved[name]) for name in entry.tensors}, **counts}
        state = {}
        for buffer in layout.buffers:
            value = saved.get(buffer.name)
            tensor = torch.full(buffer.shape, buffer.initial, dtype=buffer.dtype)
            if isinstance(value, StoredTensor):
                # came-pytorch keeps no batched view, and bf16 once torch has loaded it.
                tensor = self._archive.read(value).to(buffer.dtype).reshape(buffer.shape)
            elif value is not None:
                tensor.fill_(value)
            state[buffer.name] = tensor
        return state

    def _read(self, table: Mapping[str, Any]) -> None:
        ours = any("format_version" in group for group in table["param_groups"])
        self.kind = "state_dict" if ours else "came-pytorch"
        names = names_of(table["param_groups"])
        groups: list[dict[str, Any]] = []
        entries: list[Entry] = []
        keys: list[Any] = []
        budget = iter(range(_MOST_VALUES))
        for index, group in enumerate(table["param_groups"]):
            if not ours:
                _check_group(group, index)
            if len(group.get("param_names") or group["params"]) != len(group["params"]):
                raise ValueError(f"group {index} has too many names, or too few")
            for key in group["params"]:
                position = len(keys)
                saved = table["state"].get(key) or {}
                saved = {
                    buffer: self._counter(value, buffer) if buffer in COUNTERS else value
                    for buffer, value in saved.items()
                }
                entry = Entry(names[position] if names else None, index, None, None)
                if saved:
                    entry = (_own_entry if ours else _official_entry)(saved, entry, position)
                entries.append(entry)
                self._states.append(saved)
                keys.append(key)
            options = {
                key: self._option(value, budget)
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            # These came-pytorch has no names for, but that is what it does.
            groups.append(options if ours else {**options, **_OFFICIAL})
        if len(set(keys)) != len(keys):
            raise ValueError("a parameter is listed twice")
        self.strangers = sorted(map(str, set(table["state"]) - set(keys)))
        self.groups, self.entries = groups, entries

    def _counter(self, value: Any, name: str) -> int:
        if isinstance(value, StoredTensor):
            value = self._archive.read(value) if value.shape == () else value.shape
        return as_count(value, name)

    def _option(self, value: Any, budget: Iterator[int], depth: int = 0) -> Any:
        """Return ``value`` with its tensors; what is deep, wide or refers to itself ends."""
        if next(budget, None) is None or depth > _DEEPEST:
            raise CheckpointError(
                f"the options have more than {_MOST_VALUES} values, or are nested too deeply"
            )
        if isinstance(value, StoredTensor):
            if math.prod(value.shape) * value.dtype.itemsize > _LARGEST_OPTION:
                raise CheckpointError(f"an option is a tensor of shape {value.shape}")
            return self._archive.read(value)
        if isinstance(value, dict):
            return {key: self._option(item, budget, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._option(item, budget, depth + 1) for item in value)
        return value


def _is_optimizer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, dict) for group in value["param_groups"])
    )


def _other_contents(table: object) -> CheckpointError:
    """Return the error for what is not the state of an optimizer, but may hold it."""
    found = f"a {type(table).__name__}"
    if isinstance(table, dict):
        for key, value in table.items():
            if _is_optimizer(value):
                return CheckpointError(
                    f"a file of torch.save with the state of an optimizer under {key!r}; save it "
                    f"alone: torch.save(torch.load(...)[{key!r}], 'optimizer.pt')"
                )
        found = f"a dict with {sorted(map(str, table))[:6]}"
        if table and all(isinstance(value, StoredTensor) for value in table.values()):
            found += ", which looks like the state_dict() of a model"
    return CheckpointError(
        f"a file of torch.save with {found}, expected the state_dict() of an optimizer of came8bit "
        "or came-pytorch"
    )


def _check_group(group: Mapping[str, Any], index: int) -> None:
    if not set(group) >= _OPTIONS or len(group["betas"]) != 3 or len(group["eps"]) != 2:
        raise CheckpointError(
            f"group {index} has the options {sorted(set(map(str, group)) - {'params'})}, expected "
            f"{sorted(_OPTIONS)} with three betas and two eps: the state of another optimizer than "
            "came-pytorch cannot be continued; start with a fresh one and warm up again"
        )


def _official_entry(saved: Mapping[str, Any], entry: Entry, position: int) -> Entry:
    """Return ``entry`` with the state that came-pytorch keeps, in the momentum's shape."""
    shape = _shape_of(saved, entry, position)
    layout = plan(shape, optim_bits=32, factored_view="last_two")
    names = _FACTORED if layout.factored else {"exp_avg_sq"}
    fitting = set(saved) - {"RMS"} == {"step", "exp_avg", *names} and all(
        isinstance(saved[b.name], StoredTensor)
        and saved[b.name].dtype in _FLOATS
        and saved[b.name].shape == _official_shape(shape, b.name)
        for b in layout.buffers
        if b.name in saved and b.name != "step"
    )
    if not fitting:
        raise _strange_state(saved, entry, position)
    if not math.prod(shape):
        return replace(entry, shape=shape)
    return replace(entry, shape=shape, step=saved["step"], tensors=place(layout, 0))


def _own_entry(saved: Mapping[str, Any], entry: Entry, position: int) -> Entry:
    """Return ``entry`` with the state that this package keeps."""
    shape = _shape_of(saved, entry, position)
    tensors = {name: value for name, value in saved.items() if name not in COUNTERS}
    if not set(COUNTERS) <= set(saved):
        raise _strange_state(saved, entry, position)
    if saved["exp_avg"].dtype == torch.uint8:  # packed: the parameter's shape is not in the file
        spans = {
            name: Span(one.dtype, one.shape, 0, math.prod(one.shape) * one.dtype.itemsize)
            for name, one in tensors.items()
        }
        return replace(entry, step=saved["step"], skipped=saved["skipped"], tensors=spans)
    found = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    layout = find_layout(shape, found)
    if layout is None:
        raise _strange_state(saved, entry, position)
    spans = place(layout, 0)
    return replace(entry, shape=shape, step=saved["step"], skipped=saved["skipped"], tensors=spans)


def _shape_of(saved: Mapping[str, Any], entry: Entry, position: int) -> tuple[int, ...]:
    momentum = saved.get("exp_avg")
    if not isinstance(momentum, StoredTensor):
        raise _strange_state(saved, entry, position)
    return momentum.shape


def _strange_state(saved: Mapping[str, Any], entry: Entry, position: int) -> CheckpointError:
    found = {
        key: f"{value.dtype} {value.shape}" if hasattr(value, "shape") else type(value).__name__
        for key, value in saved.items()
    }
    return CheckpointError(
        f"parameter {label(entry, position)} has state {found}, which neither came8bit nor "
        "came-pytorch keeps"
    )


def _official_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if name.endswith("_row"):
        return shape[:-1]
    if name.endswith("_col"):
        return shape[:-2] + shape[-1:]
    return shape
