"""What a study is: tasks, optimizers, seeds, learning rates; and the three presets."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import CliError

#: Seeds of the learning-rate search, apart from those of the reported runs, which count from 0.
TUNE_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class TaskConfig:
    """One model on one kind of data, and how it is trained.

    Attributes:
        kind: ``"text"`` (a byte-level GPT) or ``"vision"`` (a ViT on Fashion-MNIST).
        steps: Optimizer steps.
        batch_size: Windows or images per optimizer step and accumulation, over all processes
            together.
        accumulate: Backward passes per optimizer step.
        layers, width, heads: Size of the transformer.
        context: Bytes per window (text only).
        warmup_steps: Steps over which the learning rate rises linearly from near 0.
        schedule: After the warm-up: ``"cosine"`` down to a tenth, or ``"constant"``.
        eval_items: Windows or images to evaluate on; fewer if the split has fewer.
        eval_every: Evaluate after each so many steps too; 0 for the end only.
        weight_decay: Decoupled; the same number for every optimizer.
        max_grad_norm: Gradients are clipped to this global norm; 0 for no clipping.
    """

    kind: str
    steps: int
    batch_size: int
    layers: int
    width: int
    heads: int
    context: int = 0
    accumulate: int = 1
    warmup_steps: int = 20
    schedule: str = "cosine"
    eval_items: int = 1024
    eval_every: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides the numbers of a study, and nothing else.

    Attributes:
        preset: Name of the preset it started from.
        tasks: The tasks, in order.
        optimizers: Keys of :data:`OPTIMIZERS`, in order.
        seeds: Seeds of the reported runs.
        slow_seeds: How many of the seeds the optimizers run that are slow on this device.
        learning_rates: Per task kind and optimizer; replaced by the search where ``tune`` is on.
        grids: Per task kind and optimizer, the learning rates the search tries.
        tune: Search the learning rate first, with :data:`TUNE_SEEDS` and a split of its own.
        mixed_precision: Accelerate's: ``"no"`` or ``"bf16"``.
        cpu: Use the CPU although there is a GPU.
    """

    preset: str
    tasks: tuple[TaskConfig, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    slow_seeds: int
    learning_rates: dict[str, dict[str, float]]
    grids: dict[str, dict[str, tuple[float, ...]]]
    tune: bool = False
    mixed_precision: str = "no"
    cpu: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RunSpec:
    """One training run: a cell of the study.

    Attributes:
        purpose: ``"final"``: reported. ``"tune"``: one of the learning-rate search, evaluated on a
            split of its own. ``"memory"``: a few steps in a process whose allocator gives back at
            once what is freed, so that the peak is what was in use.
        optimizer: Key of the optimizer.
        seed: Decides the initial weights and the order of the data, the same for every optimizer.
        lr: Peak learning rate.
    """

    purpose: str
    task: TaskConfig
    optimizer: str
    seed: int
    lr: float
    mixed_precision: str = "no"
    cpu: bool = False


ALL_OPTIMIZERS = ("adamw", "adamw8bit", "came-pytorch", "came", "came8bit")

_ADAMW = ("adamw", "adamw8bit")
_CAME = ("came-pytorch", "came", "came8bit")


def _by_family(adamw: Any, came: Any) -> dict[str, Any]:
    return dict.fromkeys(_ADAMW, adamw) | dict.fromkeys(_CAME, came)


# CAME's first updates are about ten times as long as AdamW's at the same learning rate (it has no
# bias correction), so its grid lies a factor of ten lower. Both have the same number of points and
# spacing.
_GRIDS = {
    "text": _by_family((2.5e-4, 5e-4, 1e-3, 2e-3), (2.5e-5, 5e-5, 1e-4, 2e-4)),
    "vision": _by_family((2.5e-4, 5e-4, 1e-3, 2e-3), (2.5e-5, 5e-5, 1e-4, 2e-4)),
}


@dataclass(frozen=True)
class Preset:
    """Defaults of a study; ``about`` is shown in ``--help``."""

    about: str
    tasks: tuple[TaskConfig, ...]
    seeds: int
    slow_seeds: int
    tune: bool
    mixed_precision: str = "no"
    learning_rates: dict[str, dict[str, float]] = field(default_factory=dict)


PRESETS = {
    "quick": Preset(
        about="about five minutes on 2 cores: text, learning rates found beforehand",
        tasks=(
            TaskConfig(
                kind="text",
                steps=300,
                batch_size=8,
                layers=2,
                width=256,
                heads=4,
                context=64,
                # Long for AdamW, not for CAME, which has no bias correction: with 20 steps instead
                # AdamW is 0.01 nat better and CAME 0.07 worse (docs/tradeoff.md).
                warmup_steps=100,
            ),
        ),
        seeds=3,
        slow_seeds=3,
        tune=False,
        # The best of the grid above: docs/tradeoff.md has the losses and the command.
        learning_rates={"text": _by_family(1e-3, 1e-4)},
    ),
    "standard": Preset(
        about="hours on 2 cores: text and vision, more steps and seeds, a learning-rate search",
        tasks=(
            TaskConfig(
                kind="text",
                steps=1000,
                batch_size=16,
                layers=4,
                width=256,
                heads=4,
                context=128,
                warmup_steps=200,
                eval_items=1024,
                eval_every=200,
            ),
            TaskConfig(
                kind="vision",
                steps=600,
                batch_size=64,
                layers=4,
                width=256,
                heads=4,
                warmup_steps=200,
                eval_items=10000,
                eval_every=200,
            ),
        ),
        seeds=5,
        slow_seeds=3,
        tune=True,
    ),
    "gpu": Preset(
        about="a GPU: GPT-2 small's size in bf16, and vision, with a learning-rate search",
        tasks=(
            TaskConfig(
                kind="text",
                steps=2000,
                batch_size=32,
                layers=12,
                width=768,
                heads=12,
                context=512,
                warmup_steps=400,
                eval_items=1024,
                eval_every=250,
            ),
            TaskConfig(
                kind="vision",
                steps=2000,
                batch_size=256,
                layers=6,
                width=384,
                heads=6,
                warmup_steps=400,
                eval_items=10000,
                eval_every=250,
            ),
        ),
        seeds=3,
        slow_seeds=3,
        tune=True,
        mixed_precision="bf16",
    ),
}


def preset_config(name: str) -> StudyConfig:
    """Return the study of the preset ``name``, all optimizers included."""
    preset = PRESETS[name]
    return StudyConfig(
        preset=name,
        tasks=preset.tasks,
        optimizers=ALL_OPTIMIZERS,
        seeds=tuple(range(preset.seeds)),
        slow_seeds=preset.slow_seeds,
        learning_rates=preset.learning_rates,
        grids=_GRIDS,
        tune=preset.tune,
        mixed_precision=preset.mixed_precision,
    )


Parameters = Iterable[torch.nn.Parameter]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        label: Its name in tables and pictures.
        package: The PyPI package to install if it is missing.
        module, attribute: Where its class is found.
        slow_on_cpu: Whether its step has no fast CPU implementation.
        extra: Arguments of the class besides parameters, learning rate and weight decay.
    """

    label: str
    package: str
    module: str
    attribute: str
    slow_on_cpu: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import the package and return the class."""
        return getattr(importlib.import_module(self.module), self.attribute)

    def build(self, params: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Make the optimizer."""
        made: torch.optim.Optimizer = self.load()(
            params, lr=lr, weight_decay=weight_decay, **self.extra
        )
        return made


#: Keys are the names on the command line. AdamW is the fused one: the fastest torch has.
OPTIMIZERS = {
    "adamw": OptimizerSpec("AdamW", "torch", "torch.optim", "AdamW", False, {"fused": True}),
    "adamw8bit": OptimizerSpec(
        "AdamW8bit", "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", True
    ),
    "came-pytorch": OptimizerSpec(
        "came-pytorch", "came-pytorch==0.1.3", "came_pytorch", "CAME", True
    ),
    "came": OptimizerSpec("CAME", "came8bit", "came8bit", "CAME", False),
    "came8bit": OptimizerSpec("CAME8bit", "came8bit", "came8bit", "CAME8bit", False),
}


def label(name: str) -> str:
    """Return the optimizer's name for readers."""
    return OPTIMIZERS[name].label


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as given, once each; raises CliError that lists the known ones otherwise."""
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise CliError(
            f"unknown optimizer {', '.join(map(repr, unknown))}; known: {', '.join(OPTIMIZERS)}"
        )
    return tuple(dict.fromkeys(names))


def why_unavailable(name: str) -> str | None:
    """Return why the optimizer cannot be run here and what to do, or None if it is installed.

    Looks only whether the package is there. One that is there and cannot be imported is a failure
    of the run, not something to skip.
    """
    spec = OPTIMIZERS[name]
    if importlib.util.find_spec(spec.module.partition(".")[0]) is None:
        return f"not installed: pip install '{spec.package}'"
    return None
