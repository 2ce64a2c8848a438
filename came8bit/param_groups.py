"""Groups by rule, and bitsandbytes' way to give single parameters other options.

A rule says which parameters get which options: :data:`VECTORS_WITHOUT_DECAY`,
:data:`EMBEDDINGS_IN_32_BITS` and :data:`ADAPM` are examples::

    groups = groups_by_rule(model, VECTORS_WITHOUT_DECAY | EMBEDDINGS_IN_32_BITS)
    optimizer = CAME8bit(groups, lr=2e-4, weight_decay=0.01)
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .validation import check_foreign, check_options, normalized

Options = Mapping[str, Any]
Rule = str | type[nn.Module] | Callable[[str, Tensor], bool]
"""A pattern for names, such as ``"*.lm_head.*"``; a class of modules; or a function."""


def is_vector(name: str, param: Tensor) -> bool:
    """Return whether ``param`` has fewer than two dimensions: biases, norms."""
    return param.dim() < 2


def is_head(name: str, param: Tensor) -> bool:
    """Return whether ``param`` is called ``lm_head``, as in transformers."""
    return "lm_head" in name.split(".")


VECTORS_WITHOUT_DECAY: dict[Rule, Options] = {is_vector: {"weight_decay": 0.0}}

EMBEDDINGS_IN_32_BITS: dict[Rule, Options] = {
    nn.Embedding: {"optim_bits": 32},
    is_head: {"optim_bits": 32},
}
"""As transformers' Trainer asks of bitsandbytes for embeddings; the head also."""

ADAPM: dict[Rule, Options] = {
    "*": {"optim_bits": 4},
    nn.Embedding: {"optim_bits": 0},
    "*o_proj*": {"optim_bits": 0},
    "*v_proj*": {"optim_bits": 32},
}
"""Momentum where it matters (arXiv 2510.09103): all for values, none for embeddings and the output
of attention. That paper has low rank in place of 4 bits."""


def groups_by_rule(model: nn.Module, rules: Mapping[Rule, Options]) -> list[dict[str, Any]]:
    """Divide the parameters of ``model`` into groups, one for each set of options.

    Args:
        model: its frozen parameters are left out.
        rules: which parameters get which options; of several that apply, the last one decides.

    Returns:
        Groups with named parameters, in the order of the first parameter of each.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    groups: list[dict[str, Any]] = []
    unused = {rule for rule in rules if isinstance(rule, str)}
    places: defaultdict[int, list[tuple[str, nn.Module]]] = defaultdict(list)  # several, if tied
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            places[id(param)].append((name, module))
    for name, param in model.named_parameters():
        options: dict[str, Any] = {}
        for rule, changes in rules.items():
            if any(_applies(rule, name, param, owner) for name, owner in places[id(param)]):
                unused -= {rule}
                options.update(changes)
        if not param.requires_grad:
            continue
        for group in groups:
            if {k: v for k, v in group.items() if k != "params"} == options:
                group["params"].append((name, param))
                break
        else:
            groups.append({"params": [(name, param)], **options})
    if unused:
        raise ValueError(
            f"got the rules {sorted(unused)}, which match no parameter; expected "
            "patterns of whole names, such as '*.lm_head.*'"
        )
    return groups


def _applies(rule: Rule, name: str, param: Tensor, owner: nn.Module) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule)
    return isinstance(owner, rule) if isinstance(rule, type) else rule(name, param)


def divide_for_muon(
    model: nn.Module, others: Iterable[str] = ("*lm_head*", "*embed*")
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Return the hidden matrices, for ``torch.optim.Muon``, and everything else, for CAME.

    Args:
        model: its frozen parameters are left out.
        others: patterns of names of matrices that are not for Muon, besides embeddings.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    muon: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            hidden = param.dim() == 2 and id(param) not in embeddings
            hidden = hidden and not any(fnmatchcase(name, pattern) for pattern in others)
            (muon if hidden else rest).append((name, param))
    return muon, rest


class GlobalOptimManager:
    """Options of single parameters, in bitsandbytes' terms.

    Parameters with options of their own become groups of their own, when an optimizer is made or,
    before its first step, at once. :func:`groups_by_rule` does the same in the open.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.initialize()

    def initialize(self) -> None:
        """Forget all overrides; optimizers that are made stay as they are."""
        self._options = WeakTensorKeyDictionary()
        self._modules: weakref.WeakKeyDictionary[nn.Module, dict[str, Options]]
        self._modules = weakref.WeakKeyDictionary()

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Return the one that all optimizers ask."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Do nothing: parameters are known by themselves, on whatever device."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: object = None,
        key_value_dict: Options | None = None,
    ) -> None:
        """Give ``parameters`` the option ``key``, or those of ``key_value_dict``.

        An optimizer that has stepped a parameter, or has a scheduler, which knows its groups, stays
        as it is, with a :class:`UserWarning`.

        Raises:
            ValueError, TypeError: an option is not usable.
        """
        changes = dict(key_value_dict or {}) if key is None else {key: value}
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for optimizer in list(self._optimizers):
            _regroup(optimizer, params, changes)
        for param in params:
            self._options[param] = {**self._options.get(param, {}), **changes}

    def register_module_override(self, module: nn.Module, param_name: str, config: Options) -> None:
        """Give a parameter of ``module`` the options in ``config``.

        Also the one that has its place when an optimizer is made: ``fully_shard``, ``to_empty`` and
        ``load_state_dict(assign=True)`` make new ones.
        """
        param = getattr(module, param_name)
        if param is not None:
            self.override_config(param, key_value_dict=config)
        known = self._modules.setdefault(module, {})
        known[param_name] = {**known.get(param_name, {}), **config}

    def divide(self, optimizer: Optimizer, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what becomes of a new ``group`` of ``optimizer``."""
        self._optimizers.add(optimizer)
        for module, configs in self._modules.items():
            for name, config in configs.items():
                param = getattr(module, name, None)
                if param is not None and param not in self._options:
                    self._options[param] = config
        if not self._options or not isinstance(group["params"], list):
            return [group]
        pieces = [{**group, "params": []}]
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            changes = self._options.get(param) if isinstance(param, Tensor) else None
            options = {**group, **_known(optimizer, changes or {}), "params": []}
            for piece in pieces:
                if {**piece, "params": []} == options:
                    break
            else:
                pieces.append(piece := options)
            piece["params"].append(entry)
        filled = [piece for piece in pieces if piece["params"]]
        return filled if filled and filled != pieces[:1] else [group]


def _known(optimizer: Optimizer, changes: Options) -> Options:
    """Return the options that the optimizer has, and check the others."""
    known = {name: value for name, value in changes.items() if name in optimizer.defaults}
    check_foreign({name: value for name, value in changes.items() if name not in known})
    return {**known, **normalized(known)}


def _regroup(optimizer: Optimizer, params: Iterable[Tensor], changes: Options) -> None:
    """Move ``params`` to groups with ``changes``; those of other optimizers are left alone."""
    chosen = {id(param) for param in params}
    changes = _known(optimizer, changes)
    fresh = []
    for group in optimizer.param_groups:
        inside = [p for p in group["params"] if id(p) in chosen]
        if not inside or all(group.get(name) == value for name, value in changes.items()):
            continue
        check_options({**group, **changes})
        scheduled = getattr(optimizer.step, "_wrapped_by_lr_sched", False)
        if scheduled or any(optimizer.state.get(param) for param in inside):
            why = "has a scheduler" if scheduled else "has stepped it"
            warnings.warn(
                f"override_config: an optimizer that has one of these parameters {why}, so it "
                "stays as it is; those that are made from now on have the options",
                UserWarning,
                stacklevel=4,
            )
            continue
        fresh.append(group)
    for group in fresh:
        names = group.get("param_names")
        pairs = list(zip(names or group["params"], group["params"], strict=True))
        new = {
            **group,
            **changes,
            "params": [pair if names else pair[1] for pair in pairs if id(pair[1]) in chosen],
        }
        new.pop("param_names", None)
        group["params"] = [pair[1] for pair in pairs if id(pair[1]) not in chosen]
        if names:
            group["param_names"] = [pair[0] for pair in pairs if id(pair[1]) not in chosen]
        if group.get("stream") is not None and "stream" not in changes:
            new["stream"] = (int(group["stream"]) + len(group["params"])) % 2**32
        optimizer.add_param_group(new)
