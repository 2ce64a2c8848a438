"""State dicts that ``came-pytorch`` 0.1.3 wrote with ``torch.save``, as a source to load from.

Its statistics are those of the batched last-two view, in another shape; ``rms_ratio`` starts anew,
which changes nothing but the point around which the instability is summed; ``RMS`` is not needed.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..state.layout import Layout, plan
from .format import Entry, Span, label, place

MAGIC = b"PK\x03\x04"
_OPTIONS = {"lr", "betas", "eps", "clip_threshold", "weight_decay"}
_FACTORED = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CamePytorchFile:
    """See :class:`.reader.Source`.  The file is mapped, so tensors are read when they are used.

    Raises:
        CheckpointError: it is not a state dict of came-pytorch, or a damaged one.
    """

    kind = "came-pytorch"
    user: Mapping[str, str] = {}

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self.nbytes = os.path.getsize(path)
        # torch does not look at the checksums of the archive, so this comes first.
        _check_archive(path)
        table = _load(path)
        self.groups: Sequence[Mapping[str, Any]] = []
        self.entries: Sequence[Entry] = []
        self.versions: Mapping[str, Any] = {"format": None, "came8bit": None}
        self._states: list[Mapping[str, Any]] = []
        try:
            self._read(table)
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the state dict makes no sense ({type(error).__name__}: {error})"
            ) from error

    def verify(self) -> None:
        """Nothing is left to do: opening the file has compared the checksums of the archive."""

    def read(self, position: int) -> dict[str, Tensor]:
        """The state of one parameter in fp32."""
        entry, saved = self.entries[position], self._states[position]
        if entry.step is None or entry.shape is None:
            return {}
        state = {}
        for buffer in _layout(entry.shape).buffers:
            tensor = torch.full(buffer.shape, buffer.initial, dtype=buffer.dtype)
            if buffer.name in saved:
                tensor.copy_(torch.as_tensor(saved[buffer.name]).reshape(buffer.shape))
            state[buffer.name] = tensor
        return state

    def close(self) -> None:
        """Let go of the mapping."""
        self._states = []

    def _read(self, table: Mapping[str, Any]) -> None:
        groups: list[Mapping[str, Any]] = []
        entries: list[Entry] = []
        for index, group in enumerate(table["param_groups"]):
            if "format_version" in group:
                raise _own_state_dict(self._path, "")
            _check_group(group, index)
            labels = group.get("param_names") or [None] * len(group["params"])
            for key, name in zip(group["params"], labels, strict=True):
                saved = table["state"].get(key) or {}
                entries.append(_entry(saved, name, index, len(entries)))
                self._states.append(saved)
            skip = ("params", "param_names")
            options = {key: value for key, value in group.items() if key not in skip}
            # These two came-pytorch has no names for, but that is what it does.
            groups.append({**options, "optim_bits": 32, "factored_view": "last_two"})
        names = [entry.name for entry in entries]
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            entries = [replace(entry, name=None) for entry in entries]
        self.groups, self.entries = groups, entries


def _check_archive(path: str | os.PathLike[str]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        ValueError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{path}: begins like a file of torch.save, but is truncated or damaged ({error})"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: {damaged} in the archive is damaged")


def _load(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        table = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not its own
        if "Weights only load failed" in str(error):
            raise CheckpointError(
                f"{path}: torch.load cannot read it safely: it holds Python objects, such as a "
                "whole model or optimizer, and loading those may run code; if you trust it, "
                f"torch.load({os.fspath(path)!r}, weights_only=False) in Python, then save the "
                "optimizer with came8bit.save_checkpoint"
            ) from error
        raise CheckpointError(
            f"{path}: torch.load cannot read it safely ({str(error).splitlines()[0][:200]})"
        ) from error
    if not isinstance(table, Mapping) or not _is_optimizer(table):
        raise _other_contents(path, table)
    return table


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)


def _own_state_dict(path: str | os.PathLike[str], key: str) -> CheckpointError:
    """The error for a state of this package's; ``key`` is what follows ``torch.load(path)``."""
    return CheckpointError(
        f"{path}: a file of torch.save with the state_dict() of a came8bit optimizer, which is not "
        "a checkpoint; with an optimizer over the model, "
        f"optimizer.load_state_dict(torch.load({os.fspath(path)!r}){key}), then "
        "came8bit.save_checkpoint(optimizer, ...)"
    )


def _other_contents(path: str | os.PathLike[str], table: object) -> CheckpointError:
    """The error for what is not the state of an optimizer, but may hold it."""
    found = f"a {type(table).__name__}"
    if isinstance(table, Mapping):
        for key, value in table.items():
            if _is_optimizer(value):
                if "format_version" in str(value["param_groups"]):
                    return _own_state_dict(path, f"[{key!r}]")
                return CheckpointError(
                    f"{path}: a file of torch.save with the state of an optimizer under {key!r}; "
                    "save it alone: "
                    f"torch.save(torch.load({os.fspath(path)!r})[{key!r}], 'optimizer.pt')"
                )
        found = f"a dict with {sorted(map(str, table))[:6]}"
        if table and all(isinstance(value, Tensor) for value in table.values()):
            found += ", which looks like the state_dict() of a model"
    return CheckpointError(
        f"{path}: a file of torch.save with {found}, expected the state_dict() of an optimizer of "
        "came-pytorch"
    )


def _check_group(group: Mapping[str, Any], index: int) -> None:
    if not set(group) >= _OPTIONS or len(group["betas"]) != 3 or len(group["eps"]) != 2:
        raise CheckpointError(
            f"group {index} has the options {sorted(set(map(str, group)) - {'params'})}, expected "
            f"{sorted(_OPTIONS)} with three betas and two eps: the state of another optimizer than "
            "came-pytorch cannot be continued; start with a fresh one and warm up again"
        )


def _layout(shape: Sequence[int]) -> Layout:
    return plan(shape, optim_bits=32, factored_view="last_two")


def _entry(saved: Mapping[str, Any], name: str | None, group: int, position: int) -> Entry:
    """What a header would say; the shape is that of the momentum."""
    entry = Entry(name, group, None, None)
    if not saved:
        return entry
    momentum = saved["exp_avg"]
    shape = tuple(momentum.shape)
    layout = _layout(shape)
    names = _FACTORED if layout.factored else {"exp_avg_sq"}
    fitting = set(saved) - {"RMS"} == {"step", "exp_avg", *names} and all(
        isinstance(saved[b.name], Tensor)
        and saved[b.name].dtype in _FLOATS
        and saved[b.name].shape == _official_shape(shape, b.name)
        for b in layout.buffers
        if b.name in saved and b.name != "step"
    )
    step = saved["step"].item() if isinstance(saved["step"], Tensor) else saved["step"]
    if not fitting or int(step) != step or step < 0:
        shapes = {key: getattr(value, "shape", value) for key, value in saved.items()}
        raise CheckpointError(
            f"parameter {label(entry, position)} has state {shapes}, which came-pytorch does "
            f"not keep for the shape {shape}"
        )
    if not momentum.numel():
        return Entry(name, group, shape, None)
    spans: Mapping[str, Span] = place(layout, 0)
    return Entry(name, group, shape, None, int(step), 0, None, spans)


def _official_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if name.endswith("_row"):
        return shape[:-1]
    if name.endswith("_col"):
        return shape[:-2] + shape[-1:]
    return shape
