"""Which rows of a sharded parameter are here, and its state as DTensors that are sharded alike.

A ``DTensor`` with ``Shard(0)`` on one dimension of its mesh and ``Replicate`` on the others, as
FSDP2 makes them. Blocks of codes never cross a slice of dimension 0, so that every rank owns whole
ones, and all buffers but the column statistics are cut like the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..reference.quant import slice_shape
from .layout import Buffer, Layout

# Looking for an attribute that is not there takes long, and a step asks about every tensor.
PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types whose memory is their own."""


def is_sharded(tensor: object) -> bool:
    """Return whether ``tensor`` is a DTensor, whose other parts may be on other ranks."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that is here; no copy."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def full(tensor: Tensor) -> Tensor:
    """Return all of ``tensor`` on every rank; all ranks have to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shard:
    """The rows of dimension 0 that this rank has of a parameter.

    Attributes:
        shape: of the full parameter.
        mesh: of the DTensor, ``placements`` too.
        dim: of the mesh, along which rows are cut; None if every rank has all of them.
        ranks: how many ranks share the rows.
        first: number of the first row here.
        size: how many there are here.
    """

    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    dim: int | None
    ranks: int
    first: int
    size: int

    @property
    def offset(self) -> int:
        """Row-major index of the first element here in the full parameter."""
        return self.first * (slice_shape(self.shape)[1] if len(self.shape) > 1 else 1)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what is here."""
        return (self.size, *self.shape[1:]) if self.shape else ()

    def splits_rows(self, layout: Layout) -> bool:
        """Return whether rows of one matrix are on several ranks, rather than whole matrices."""
        return layout.factored and layout.view == (1, *slice_shape(self.shape))

    def columns(self, layout: Layout) -> int:
        """Return what :func:`came8bit.reference.sums_sizes` wants to know."""
        if not layout.factored:
            return -1
        return layout.view[2] if self.splits_rows(layout) else 0

    def cut(self, buffer: Buffer, layout: Layout) -> int | None:
        """Return the dimension along which ``buffer`` is cut, None if every rank has all of it."""
        if self.dim is None or not buffer.shape:
            return None
        if buffer.name.endswith(("_row", "_col")) and self.splits_rows(layout):
            return 1 if buffer.name.endswith("_row") else None
        return 0

    def _range(self, buffer: Buffer, dim: int) -> tuple[int, int]:
        """Return the first index of ``buffer`` along ``dim`` that is here, and how many are."""
        each = buffer.shape[dim] // self.shape[0]  # matrices of a slice
        return self.first * each, self.size * each

    def part(self, value: Tensor, buffer: Buffer, layout: Layout) -> Tensor:
        """Return what belongs here of ``value``, a whole buffer or a DTensor that is cut alike."""
        if is_sharded(value):
            if tuple(value.placements) != self._placements(buffer, layout):  # type: ignore[attr-defined]
                value = value.redistribute(self.mesh, self._placements(buffer, layout))  # type: ignore[attr-defined]
            return local(value)
        dim = self.cut(buffer, layout)
        return value if dim is None else value.narrow(dim, *self._range(buffer, dim))

    def local_buffer(self, buffer: Buffer, layout: Layout) -> Buffer:
        """Return ``buffer`` with the shape that it has here."""
        dim = self.cut(buffer, layout)
        if dim is None:
            return buffer
        shape = list(buffer.shape)
        shape[dim] = self._range(buffer, dim)[1]
        return replace(buffer, shape=tuple(shape))

    def wrap(self, tensor: Tensor, buffer: Buffer, layout: Layout) -> Tensor:
        """Return ``tensor``, what is here of ``buffer``, as a DTensor; a scalar as it is."""
        if not buffer.shape:
            return tensor
        from torch.distributed.tensor import DTensor

        wrapped: Tensor = DTensor.from_local(
            tensor,
            self.mesh,
            self._placements(buffer, layout),
            run_check=False,
            shape=torch.Size(buffer.shape),
            stride=torch.empty(buffer.shape, device="meta").stride(),
        )
        return wrapped

    def _placements(self, buffer: Buffer, layout: Layout) -> tuple[Any, ...]:
        from torch.distributed.tensor import Replicate, Shard

        dim = self.cut(buffer, layout)
        cut = Replicate() if dim is None else Shard(dim)
        return tuple(cut if i == self.dim else Replicate() for i in range(self.mesh.ndim))


def shard_of(param: Tensor) -> Shard:
    """Return what is here of the DTensor ``param``.

    Raises:
        NotImplementedError: its placements are not supported.
    """
    mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
    return _shard(tuple(param.shape), _Same(mesh), placements)


class _Same:
    """A mesh as a key: another one with the same ranks has other process groups."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __hash__(self) -> int:
        return id(self.mesh)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.mesh is self.mesh


@lru_cache(1 << 14)
def _shard(shape: tuple[int, ...], key: _Same, placements: tuple[Any, ...]) -> Shard:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Cut

    mesh = key.mesh
    dims = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    supported = all(type(placements[i]) is Cut and placements[i].dim == 0 for i in dims)
    if len(dims) > 1 or not supported:
        raise NotImplementedError(
            f"has placements {placements}, expected Shard(0) on at most one dimension of the mesh "
            "and Replicate on the others, as fully_shard makes them; give parameters of tensor "
            "parallelism to another optimizer"
        )
    if not dims:
        return Shard(shape, mesh, placements, None, 1, 0, shape[0] if shape else 1)
    ranks, rank = mesh.size(dims[0]), mesh.get_local_rank(dims[0])
    # As torch.chunk: the last ranks have fewer rows, or none.
    each = -(-shape[0] // ranks)
    first = min(rank * each, shape[0])
    return Shard(shape, mesh, placements, dims[0], ranks, first, min(each, shape[0] - first))


def check_shard(param: Tensor, layout: Layout) -> None:
    """Check that what ``layout`` keeps of the DTensor ``param`` can be cut like it.

    Raises:
        NotImplementedError: it cannot.
    """
    shard = shard_of(param)
    if tuple(local(param).shape) != shard.local_shape:
        raise NotImplementedError(
            f"has a part of shape {tuple(local(param).shape)} here, expected {shard.local_shape}, "
            "as torch.chunk cuts dimension 0"
        )
    if shard.dim is not None and len(shard.shape) < 2 and layout.momentum_bits != 32:
        raise NotImplementedError(
            "is a vector whose blocks of codes the ranks would cut; put it into a group with "
            "quantize_vectors=False"
        )
    matrices = layout.view[0] // shard.shape[0] if layout.factored and shard.shape[0] else 1
    if shard.dim is not None and matrices > 1 and shard.shape[0] % shard.ranks:
        raise NotImplementedError(
            f"is {matrices} matrices in each of {shard.shape[0]} slices, which {shard.ranks} ranks "
            "cannot share evenly; use a parameter of three dimensions"
        )


def allocate_sharded(layout: Layout, param: Tensor) -> dict[str, Tensor]:
    """Return new buffers with their initial values, as DTensors that are cut like ``param``."""
    shard, device = shard_of(param), local(param).device
    state = {}
    for buffer in layout.buffers:
        shape = shard.local_buffer(buffer, layout).shape
        here = torch.full(shape, buffer.initial, dtype=buffer.dtype, device=device)
        state[buffer.name] = shard.wrap(here, buffer, layout)
    return state


def copy_sharded(saved: Mapping[str, Any], layout: Layout, param: Tensor) -> dict[str, Tensor]:
    """Return new buffers of ``layout``, cut like ``param``, with the values of ``saved``.

    Args:
        saved: whole tensors, DTensors, and counters that may be integers.
    """
    shard, device = shard_of(param), local(param).device
    state = {}
    for buffer in layout.buffers:
        value = torch.as_tensor(saved[buffer.name], dtype=buffer.dtype).detach()
        here = shard.part(value, buffer, layout)
        copied = torch.empty(here.shape, dtype=buffer.dtype, device=device).copy_(here)
        state[buffer.name] = shard.wrap(copied, buffer, layout)
    return state


def mesh_of(tensors: Iterable[object]) -> Any:
    """Return the mesh of the first DTensor, None if there is none."""
    return next((x.device_mesh for x in tensors if is_sharded(x)), None)  # type: ignore[attr-defined]


def is_first(mesh: Any) -> bool:
    """Return whether this is the first rank of ``mesh``."""
    return not any(mesh.get_coordinate())


def sum_over(mesh: Any, numbers: Sequence[int]) -> list[int]:
    """Return the sums of ``numbers`` over all ranks of ``mesh``, which all have to call this."""
    total = torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    summed: list[int] = total.tolist()
    return summed
