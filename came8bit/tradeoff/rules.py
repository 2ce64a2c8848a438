"""Parameter groups for arms that give parameters different options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from .. import param_groups
from ..param_groups import Options, Rule


def _called(*patterns: str) -> Callable[[str, Tensor], bool]:
    return lambda name, param: any(fnmatchcase(name, pattern) for pattern in patterns)


# In place of the patterns of `param_groups.ADAPM`, which are Llama's names: the same layers of all
# models here. GPT-2 has queries, keys and values in one matrix, which counts as values.
_LAYERS: dict[Rule, Rule] = {
    "*o_proj*": _called("*.o_proj.*", "*.attention.output.dense.*", "*.attn.c_proj.*"),
    "*v_proj*": _called("*.v_proj.*", "*.self.value.*", "*.attn.c_attn.*"),
}

#: What ``OptimizerSpec.rules`` can name.
RULES: dict[str, Mapping[Rule, Options]] = {
    "ADAPM": {_LAYERS.get(rule, rule): options for rule, options in param_groups.ADAPM.items()}
}
