"""Bytes of state of each optimizer, buffer by buffer, and what a step needs besides.

came8bit's come from :mod:`came8bit.state`, by which the optimizers themselves allocate. Those of
``torch.optim.AdamW`` and bitsandbytes follow their ``init_state``; tests compare all of them with
tensors that were really allocated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..paging.pages import default_budget, page_layout
from ..state.layout import DEFAULT_MIN_8BIT_SIZE, OPTIM_BITS, plan
from .activations import Parameter

#: bitsandbytes keeps the state of smaller parameters on the device in its paged optimizers.
BNB_PAGED_SIZE = 100_000
_BNB_BLOCK = 256
_BNB_TABLES = 2 * 256 * 4  # qmap1 and qmap2, shared by all parameters

#: Temporaries of a step of came8bit's kernels: measured 0.2 to 2.2 MB on the CPU; this is the bound
#: that tests hold them to.
WORKSPACE_BYTES = 8_000_000
WORKSPACE_FRACTION = 0.005  # of the parameters' bytes


@dataclass(frozen=True)
class Options:
    """What decides the state's bytes besides the shapes.

    Attributes:
        itemsize: bytes per element of the parameters, 2 or 4.
        min_8bit_size: parameters with fewer elements keep 32-bit state.
        fp32_embeddings: whether embeddings keep 32-bit state. transformers' ``Trainer`` asks
            bitsandbytes for that; with came8bit it is a parameter group with ``optim_bits=32``.
        quantize_vectors: whether came8bit's momentum of vectors has codes too. Those of
            bitsandbytes always have.
        budget: ``page_budget`` of the paged optimizers, bytes of the device; ``None``: the default.
    """

    itemsize: int = 2
    min_8bit_size: int = DEFAULT_MIN_8BIT_SIZE
    fp32_embeddings: bool = False
    quantize_vectors: bool = False
    budget: int | None = None


@dataclass
class State:
    """State of all parameters.

    Attributes:
        device: buffer name -> bytes on the device.
        host: buffer name -> bytes in the memory of the host.
        pages: bytes of the paged state of each parameter that has some, largest first.
        staging: bytes of the device through which pages pass.
    """

    device: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    pages: list[int] = field(default_factory=list)
    staging: int = 0

    @property
    def nbytes(self) -> int:
        """All state, wherever it is, each byte once."""
        return sum(self.device.values()) + sum(self.host.values())


def _adamw(parameters: Iterable[Parameter], options: Options, *, fused: bool) -> State:
    """Return state in the parameter's dtype; the counter is fp32, on the CPU unless fused."""
    state = State()
    for parameter in parameters:
        for name in ("exp_avg", "exp_avg_sq"):
            state.device[name] += parameter.numel * options.itemsize
        (state.device if fused else state.host)["step"] += 4
    return state


def _bitsandbytes(
    parameters: Iterable[Parameter], options: Options, *, bits: int, paged: bool
) -> State:
    state = State()
    coded = False
    for parameter in parameters:
        numel = parameter.numel
        small = numel < options.min_8bit_size or (parameter.embedding and options.fp32_embeddings)
        eight = bits == 8 and not small
        paged_here = paged and numel >= BNB_PAGED_SIZE
        for index in "12":
            place = state.host if paged_here else state.device
            place[f"state{index}"] += numel * (1 if eight else 4)
            if eight:
                state.device[f"absmax{index}"] += 4 * -(-numel // _BNB_BLOCK)
        if paged_here:
            state.pages.append(2 * numel * (1 if eight else 4))
        coded |= eight
    if coded:
        state.device["code tables"] = _BNB_TABLES
    # Managed memory moves when it is touched: at least the parameter in hand is on the device.
    state.pages.sort(reverse=True)
    state.staging = state.pages[0] if state.pages else 0
    return state


def _came(parameters: Iterable[Parameter], options: Options, *, bits: int, paged: bool) -> State:
    state = State()
    for parameter in parameters:
        wide = parameter.embedding and options.fp32_embeddings
        layout = plan(
            parameter.shape,
            optim_bits=max(OPTIM_BITS) if wide else bits,
            min_8bit_size=options.min_8bit_size,
            quantize_vectors=options.quantize_vectors,
        )
        page = page_layout(layout) if paged else None
        on_page = page.buffers if page else ()
        for buffer in layout.buffers:
            place = state.host if buffer in on_page else state.device
            place[_group(buffer.name, layout.momentum_bits)] += buffer.nbytes
        if page:
            state.pages.append(page.nbytes)
            gaps = page.nbytes - sum(buffer.nbytes for buffer in on_page)
            if gaps:
                state.host["alignment"] += gaps
    if state.pages:
        state.pages.sort(reverse=True)
        state.staging = _staging(state.pages, options.budget)
    return state


def _group(buffer: str, momentum_bits: int) -> str:
    """Return under which name a buffer of :mod:`came8bit.state.layout` is shown."""
    if buffer == "exp_avg":
        return "momentum codes" if momentum_bits < max(OPTIM_BITS) else "momentum"
    if buffer.startswith("exp_avg_") and buffer != "exp_avg_sq":
        return "statistics"
    counters = dict.fromkeys(("rms_ratio", "step", "skipped"), "counters")
    return {"exp_avg_sq": "full second moment", **counters}.get(buffer, buffer)


def _staging(pages: Sequence[int], budget: int | None) -> int:
    """Return the bytes of the device that pages take: all of them if they fit, else the budget."""
    if budget is None:
        return min(sum(pages), default_budget("cuda", pages))
    if budget < max(pages):
        raise ValueError(
            f"got a page budget of {budget:,} bytes, but the largest parameter has a page of "
            f"{max(pages):,}; give at least that, and three times as much for copies to overlap"
        )
    return min(sum(pages), budget)


def _no_temporaries(parameters: Sequence[Parameter], options: Options) -> int:
    return 0


def _root_of_second_moment(parameters: Sequence[Parameter], options: Options) -> int:
    """Return the default, ``foreach``: a list of roots of all second moments."""
    return sum(parameter.numel for parameter in parameters) * options.itemsize


def _workspace(parameters: Sequence[Parameter], options: Options) -> int:
    total = sum(parameter.numel for parameter in parameters) * options.itemsize
    return WORKSPACE_BYTES + math.ceil(WORKSPACE_FRACTION * total)


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that can be planned for.

    Attributes:
        key: on the command line.
        label: human-readable; of this package's optimizers the class.
        package: where it is from.
        state: bytes of state.
        temporaries: bytes that a step over these parameters needs besides, for its duration.
    """

    key: str
    label: str
    package: str
    state: Callable[[Sequence[Parameter], Options], State]
    temporaries: Callable[[Sequence[Parameter], Options], int] = _no_temporaries


def _kinds() -> Iterator[OptimizerKind]:
    for fused in (False, True):
        yield OptimizerKind(
            "adamw-fused" if fused else "adamw",
            "AdamW, fused" if fused else "AdamW",
            "torch",
            partial(_adamw, fused=fused),
            _no_temporaries if fused else _root_of_second_moment,
        )
    for bits, paged in ((32, False), (8, False), (8, True)):
        name = f"{'Paged' if paged else ''}AdamW{bits}bit"
        key = f"{'paged-' if paged else ''}adamw{bits}bit"
        state = partial(_bitsandbytes, bits=bits, paged=paged)
        yield OptimizerKind(key, name, "bitsandbytes", state)
    for bits in filter(None, OPTIM_BITS):  # without momentum there are groups, but no class
        for paged in (False, True):
            name = f"{'Paged' if paged else ''}CAME{bits}bit"
            key = f"{'paged-' if paged else ''}came{bits}bit"
            state = partial(_came, bits=bits, paged=paged)
            yield OptimizerKind(key, name, "came8bit", state, _workspace)


OPTIMIZERS: dict[str, OptimizerKind] = {kind.key: kind for kind in _kinds()}
