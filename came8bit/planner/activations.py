"""A model on fake tensors: its parameters, and what forward and backward keep in memory.

A fake tensor has a shape, a dtype and a lifetime, but no memory. :func:`trace` runs one forward
and backward of a model made of them and follows every storage that an operator returns until it
is freed, so the counts are those of autograd itself, for every architecture. Only tensors count:
workspaces inside kernels are not seen.
"""

from __future__ import annotations

import logging
import math
import textwrap
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bytes = np.ndarray[Any, np.dtype[np.int64]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Untraceable(ValueError):
    """The model cannot be run on fake tensors; the message says why."""


def in_short(error: Exception) -> str:
    """Return what another library's ``error`` says in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


@dataclass(frozen=True)
class Trace:
    """Bytes alive after each operator of a forward and backward, without parameters and inputs.

    Attributes:
        alive: all of them; each gradient until its parameter could be updated.
        logits: of ``alive``, tensors as wide as the vocabulary with a row for each token.
        gradients: of ``alive``, gradients of parameters.
        complete: bytes of all gradients that are complete by then, which come on top of ``alive``
            unless each of them is freed after its parameter's update.
        backward: index of the first operator of the backward.
        updates: where each gradient is complete: index of the operator, name of the parameter.
    """

    alive: Bytes
    logits: Bytes
    gradients: Bytes
    complete: Bytes
    backward: int
    updates: tuple[tuple[int, str], ...]

    @property
    def saved(self) -> int:
        """Bytes alive between forward and backward."""
        return int(self.alive[self.backward - 1])

    def extended(self, other: Trace, steps: int) -> Trace | None:
        """Return the trace ``steps`` batches further than ``other``, which is one further.

        Bytes are linear in the batch as long as the operators are the same; ``None`` if not.
        """
        if len(self.alive) != len(other.alive) or self.updates != other.updates:
            return None
        arrays = ("alive", "logits", "gradients", "complete")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in arrays}
        return replace(self, **{n: a + steps * (b - a) for n, (a, b) in pairs.items()})


class StorageCounter(TorchDispatchMode):
    """Follow every storage that operators return, until it is freed.

    Args:
        ignore: tensors whose storages do not count.
        is_logits: tells which storages are counted as logits as well.

    Attributes:
        alive: bytes alive after each operator.
        logits: those of logits.
        now: bytes alive at the moment.
    """

    def __init__(
        self, ignore: Sequence[Tensor], is_logits: Callable[[Tensor], bool] = lambda tensor: False
    ) -> None:
        super().__init__()
        self.alive: list[int] = []
        self.logits: list[int] = []
        self.now = self._logits_now = 0
        self._is_logits = is_logits
        # Storage -> (index of the operator that made it, its finalizer).
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: (0, None) for t in ignore}

    @property
    def peak(self) -> int:
        """The most that was alive at once."""
        return max(self.alive, default=0)

    def born(self, tensor: Tensor) -> int:
        """Return the index of the operator that made the storage of ``tensor``."""
        index: int = self._known[tensor.untyped_storage()._cdata][0]
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.alive.append(self.now)
        self.logits.append(self._logits_now)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        logits = size if self._is_logits(tensor) else 0
        gone = weakref.finalize(storage, self._gone, key, size, logits)
        self._known[key] = (len(self.alive), gone)
        self.now += size
        self._logits_now += logits

    def _gone(self, key: int, size: int, logits: int) -> None:
        del self._known[key]
        self.now -= size
        self._logits_now -= logits


def trace(
    model: nn.Module, loss: Callable[[], Tensor], inputs: Sequence[Tensor], vocabulary: int = 0
) -> Trace:
    """Count the bytes of one forward and backward; the gradients are gone afterwards.

    Args:
        model: what is trained, of fake tensors or real ones.
        loss: runs the forward.
        inputs: tensors that are not counted.
        vocabulary: width of the logits; 0 if there are none.
    """
    rows = {tensor.numel() for tensor in inputs}
    rows |= {tensor.numel() - len(tensor) for tensor in inputs if tensor.ndim}  # shifted by a token

    def is_logits(tensor: Tensor) -> bool:
        wide = vocabulary > 0 and tensor.ndim > 1 and tensor.shape[-1] == vocabulary
        return wide and tensor.numel() // vocabulary in rows

    loss()  # makes the tables that are made once and stay
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spans: list[tuple[int, int, int, str]] = []
    with StorageCounter([*model.parameters(), *model.buffers(), *inputs], is_logits) as counter:

        def update(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            size = gradient.untyped_storage().nbytes()
            spans.append((counter.born(gradient), len(counter.alive), size, names[id(parameter)]))
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
        value = loss()
        backward = len(counter.alive)
        value.backward()
        for handle in handles:
            handle.remove()
    gradients, complete = np.zeros((2, len(counter.alive) + 1), np.int64)
    for born, done, size, _ in spans:
        gradients[born] += size
        gradients[done] -= size
        complete[done] += size
    return Trace(
        alive=np.array(counter.alive),
        logits=np.array(counter.logits),
        gradients=gradients.cumsum()[:-1],
        complete=complete.cumsum()[:-1],
        backward=backward,
        updates=tuple((done - 1, name) for _, done, _, name in spans),
    )


def dropout_of_gpus() -> AbstractContextManager[Any]:
    """Let dropout keep a mask of one byte an element, as it does on a GPU.

    On a CPU, PyTorch keeps the mask in the dtype of the input.
    """
    return mock.patch.object(nn.functional, "dropout", _dropout)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


class Workload:
    """A model that :func:`trace` can run, in any setting; traces are kept.

    Attributes:
        build: makes the model in a dtype and with activation checkpointing or without.
        inputs: makes the arguments of the model for a batch and a sequence.
        loss: runs the forward and returns a scalar.
        vocabulary: width of the logits; 0 if there are none.
        longest: the longest sequence that there are position embeddings for; ``None``: any.
        checkpointing: the line of Python that turns activation checkpointing on.
        has_loss: whether the model computes its own loss.
    """

    def __init__(
        self,
        build: Callable[[torch.dtype, bool, str | None], nn.Module],
        inputs: Callable[[nn.Module, int, int, torch.dtype], Mapping[str, Tensor]],
        loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
        *,
        vocabulary: int = 0,
        longest: int | None = None,
        checkpointing: str = "",
        has_loss: bool = True,
    ) -> None:
        self.build, self.inputs, self.loss = build, inputs, loss
        self.vocabulary, self.longest = vocabulary, longest
        self.checkpointing, self.has_loss = checkpointing, has_loss
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def trace(
        self,
        dtype: str,
        batch: int,
        sequence: int,
        *,
        checkpointing: bool = False,
        attention: str | None = None,
    ) -> Trace:
        """Return the trace of one micro-batch.

        Args:
            dtype: of parameters and activations, a key of :data:`DTYPES`.
            batch: sequences.
            sequence: tokens in each.
            checkpointing: whether each layer's forward runs again in the backward.
            attention: ``"sdpa"``, ``"eager"``, or ``None`` for the model's default.

        Raises:
            ValueError: the sequence is longer than the model's table of positions.
            Untraceable: the model does not run on fake tensors.
        """
        if self.longest is not None and sequence > self.longest:
            raise ValueError(
                f"got sequence {sequence}, but the model has positions up to {self.longest}"
            )
        key = (dtype, batch, sequence, checkpointing, attention)
        if key not in self._traces:
            try:
                self._traces[key] = self._run(DTYPES[dtype], *key[1:])
            except Exception as error:  # whatever a model's own code raises
                said = in_short(error)
                raise Untraceable(f"it does not run on fake tensors ({said})") from error
        return self._traces[key]

    def _run(
        self,
        dtype: torch.dtype,
        batch: int,
        sequence: int,
        checkpointing: bool,
        attention: str | None,
    ) -> Trace:
        # What does not run is reported, in one line.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        with FakeTensorMode(), dropout_of_gpus(), mock.patch.object(log, "disabled", True):
            model = self.build(dtype, checkpointing, attention).train()
            inputs = self.inputs(model, batch, sequence, dtype)
            return trace(
                model, lambda: self.loss(model, inputs), list(inputs.values()), self.vocabulary
            )

    def at_batch(self, batch: int, **settings: Any) -> Trace | None:
        """Return the trace of ``batch``, by the line through batches 2 and 3; arguments as above.

        A batch of 1 is traced itself: views that are contiguous only there need fewer copies.
        ``None`` if the operators depend on the batch.
        """
        if batch < 4:
            return self.trace(batch=batch, **settings)
        two, three = (self.trace(batch=batch, **settings) for batch in (2, 3))
        return two.extended(three, batch - 2)


@dataclass(frozen=True)
class Parameter:
    """A trained tensor.

    Attributes:
        name: as in ``model.named_parameters()``.
        shape: sizes.
        embedding: whether it is the table of an ``nn.Embedding``.
    """

    name: str
    shape: tuple[int, ...]
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        name: human-readable.
        source: where the shapes come from, human-readable.
        parameters: every parameter once.
        workload: what runs it; ``None`` where only shapes are known.
        notes: what the reader has to know, one sentence each.
        unknown: why activations are not known, where that needs saying.
    """

    name: str
    source: str
    parameters: tuple[Parameter, ...]
    workload: Workload | None = None
    notes: tuple[str, ...] = field(default=())
    unknown: str = ""

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def largest(self) -> Parameter:
        """The largest parameter."""
        return max(self.parameters, key=lambda parameter: parameter.numel)


def note_of_left_out(names: list[str]) -> str:
    """Return the note that tensors called ``names`` do not train."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensors that do not train are left out: {shown}."
