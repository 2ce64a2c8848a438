"""A third kind of store, written against the protocol alone: state as bytes, one at a time."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from came8bit import CAME8bit
from came8bit.state import store


class BytesStore:
    """Keeps every state tensor as bytes and makes tensors of them for a visit.

    Two states at once would be a leak: what was lent has to be gone before more is.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, dict[str, tuple[bytes, torch.dtype, torch.Size]]] = {}
        self.lent: list[weakref.ref[torch.Tensor]] = []
        self.shown: defaultdict[Any, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @property
    def state(self) -> defaultdict[Any, Any]:
        if self.shown is not None:
            return self.shown
        counters = ("step", "skipped")
        return defaultdict(
            dict,
            {
                param: {name: self._tensor(*kept[name]) for name in counters}
                for param, kept in self.kept.items()
            },
        )

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self.kept.clear()
        for param, tensors in state.items():
            self._keep(param, tensors)

    def shape_of(self, param):
        kept = self.kept.get(param)
        return kept["exp_avg"][2] if kept else None

    def drop_others(self, params):
        wanted = set(params)
        self.kept = {param: kept for param, kept in self.kept.items() if param in wanted}

    def reserve(self, groups):
        pass

    def check(self, groups):
        pass

    def prepare(self, work, groups):
        for item, layout in store.fresh_items(work):
            state = store.allocate(layout, item.param.device)
            self._keep(item.param, state)
            item.state.update({name: state[name] for name in ("step", "skipped")})

    def visit(self, items, run):
        for item in items:
            complete = replace(item, state=self.read(item.param))
            run([complete])
            self._keep(item.param, complete.state)
            for name in ("step", "skipped"):
                item.state[name].copy_(complete.state[name])
            del complete

    def set_prefetch_order(self, params):
        pass

    def flush(self):
        pass

    def read(self, param):
        assert all(tensor() is None for tensor in self.lent), "still holds another parameter"
        made = {name: self._tensor(*kept) for name, kept in self.kept.get(param, {}).items()}
        self.lent = [weakref.ref(tensor) for tensor in made.values()]
        return made

    def write(self, param, state):
        assert all(tensor() is None for tensor in self.lent), "still holds another parameter"
        self.lent = [weakref.ref(tensor) for tensor in state.values()]
        self._keep(param, state)

    def replace_all(self, saved):
        made = {param: store.copy(state, layout, param.device) for param, layout, state in saved}
        self.kept.clear()
        for param, state in made.items():
            self._keep(param, state)

    def adopt(self, state):
        self.state = state

    @contextmanager
    def complete(self):
        self.shown = defaultdict(
            dict,
            {
                param: {name: self._tensor(*one) for name, one in kept.items()}
                for param, kept in self.kept.items()
            },
        )
        try:
            yield
        finally:
            self.shown = None

    def _keep(self, param, state):
        self.kept[param] = {
            name: (tensor.numpy().tobytes(), tensor.dtype, tensor.shape)
            for name, tensor in state.items()
        }

    @staticmethod
    def _tensor(raw, dtype, shape):
        return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


class Elsewhere(CAME8bit):
    """Keeps its state as bytes; code that reaches past the store finds nothing."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._store = BytesStore()
