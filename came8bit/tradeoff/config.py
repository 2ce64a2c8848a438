"""What a study is: tasks, optimizers, seeds and learning rates; and the presets."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..param_groups import groups_by_rule
from .rules import RULES

#: Seeds of the learning-rate search, apart from those of the reported runs, which count from 0.
TUNE_SEEDS = (1000, 1001)

#: Text that ``tools/fetch_data.py`` can fetch; ``stdlib`` needs no fetching.
CORPORA = ("stdlib", "gcide", "austen", "wordnet", "linux-docs", "python-docs", "shakespeare")

# ---- optimizers ----


@dataclass(frozen=True)
class OptimizerSpec:
    """One arm of a study.

    Attributes:
        label: Its name in tables and pictures.
        path: Dotted name of the class.
        options: Arguments of the class besides parameters, learning rate and weight decay.
        lr: Peak learning rate for the task of the preset ``quick``.
        colour, marker: Matplotlib's, for pictures.
        package: The PyPI package to install if it is missing.
        slow_on_cpu: Whether its step has no fast CPU implementation.
        rule: Arms of one rule differ in bits only: the picture connects them, and the report
            compares each with the widest.
        tuned_as: The arm whose learning-rate search decides for this one too, where both are run:
            an optimizer with the same rule, which differs in how it stores its state.
        start: Where ``--tune`` starts, if not at ``lr``: where those of docs/evidence.md started.
        rules: Key of :data:`came8bit.tradeoff.rules.RULES` that divides the parameters into groups.
    """

    label: str
    path: str
    options: Mapping[str, Any]
    lr: float
    colour: str
    marker: str
    package: str = ""
    slow_on_cpu: bool = False
    rule: str = ""
    tuned_as: str = ""
    start: float = 0.0
    rules: str = ""

    @property
    def call(self) -> str:
        """The constructor's call without learning rate, weight decay and ungrouped parameters."""
        options = [f"{key}={value!r}" for key, value in sorted(self.options.items())]
        groups = [f"groups_by_rule(model, {self.rules})"] if self.rules else []
        return f"{self.path}({', '.join(groups + options)})"

    def load(self) -> Any:
        """Import the package and return the class."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def build(
        self, model: torch.nn.Module, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Make the optimizer for what is trained of the model."""
        params: list[Any] = [p for p in model.parameters() if p.requires_grad]
        if self.rules:
            params = groups_by_rule(model, RULES[self.rules])
        made: torch.optim.Optimizer = self.load()(
            params, lr=lr, weight_decay=weight_decay, **self.options
        )
        return made


_PUBLISHED = ("published", (5e-5, 1e-4), "#0060a0", dict(bias_correction=False, nesterov=False))
_CORRECTED = ("corrected", (1e-3, 1e-3), "#009e73", dict(bias_correction=True, nesterov=False))
_NESTEROV = ("nesterov", (1e-3, 2e-3), "#d55e00", dict(bias_correction=True, nesterov=True))
_Rule = tuple[str, tuple[float, float], str, dict[str, Any]]
_MARKERS = {32: "D", 8: "*", 4: "h", 2: "X", 0: "d"}
_BNB = "bitsandbytes.optim.AdamW8bit"


def _came(name: str, rule: _Rule, bits: int) -> OptimizerSpec:
    key, (lr, start), colour, options = rule
    # Options are written out, so that an arm stays what it is when defaults change.
    options = dict(optim_bits=bits) | options
    widest = "" if bits == 32 else "came" if rule is _NESTEROV else f"came-{key}"
    made = OptimizerSpec(name, "came8bit.CAME", options, lr, colour, _MARKERS[bits])
    return replace(made, rule=key, tuned_as=widest, start=start)


_NADAM = dict(decoupled_weight_decay=True)

#: What can be compared; the keys are the names on the command line. A new arm is one entry here.
OPTIMIZERS = {
    "adamw": OptimizerSpec("AdamW", "torch.optim.AdamW", dict(fused=True), 1e-3, "#4d4d4d", "o"),
    "nadamw": OptimizerSpec(
        "NAdamW", "torch.optim.NAdam", _NADAM, 1e-3, "#8a8a8a", "P", start=2e-3
    ),
    "adafactor": OptimizerSpec(
        "Adafactor", "torch.optim.Adafactor", {}, 4e-2, "#7a5195", "v", start=1e-2
    ),
    "adamw8bit": OptimizerSpec(
        "AdamW8bit", _BNB, {}, 1e-3, "#d08c00", "s", "bitsandbytes", True, tuned_as="adamw"
    ),
    "came-pytorch": OptimizerSpec(
        *("came-pytorch", "came_pytorch.CAME", {}, 5e-5, "#3fa0d8", "^", "came-pytorch==0.1.3"),
        slow_on_cpu=True,
        tuned_as="came-published",
        start=1e-4,
    ),
    "came-published": _came("CAME, published", _PUBLISHED, 32),
    "came8bit-published": _came("CAME8bit, published", _PUBLISHED, 8),
    "came-corrected": _came("CAME, bias correction", _CORRECTED, 32),
    "came8bit-corrected": _came("CAME8bit, bias correction", _CORRECTED, 8),
    "came": _came("CAME, Nesterov", _NESTEROV, 32),
    "came8bit": _came("CAME8bit, Nesterov", _NESTEROV, 8),
    "came4bit": _came("CAME4bit, Nesterov", _NESTEROV, 4),
    "came2bit": _came("CAME2bit, Nesterov", _NESTEROV, 2),
    # Every update acts at once, so another learning rate is best.
    "came0bit": replace(_came("CAME without momentum", _NESTEROV, 0), tuned_as=""),
    "came-adapm": replace(
        _came("CAME, AdaPM groups", _NESTEROV, 4), tuned_as="", marker="p", rules="ADAPM"
    ),
}


def label(name: str) -> str:
    """Return the optimizer's name for readers."""
    return OPTIMIZERS[name].label


def why_unavailable(name: str) -> str | None:
    """Return why the optimizer cannot be run here and what to do, or None if it is installed.

    Looks only whether the package is there. One that is installed and cannot be imported is a
    failure of the run, not something to skip.
    """
    spec = OPTIMIZERS[name]
    if importlib.util.find_spec(spec.path.partition(".")[0]) is None:
        return f"not installed: pip install '{spec.package}'"
    return None


# ---- tasks ----


@dataclass(frozen=True)
class TaskConfig:
    """One model on one kind of data, and how it is trained. What a task does not use is 0.

    Attributes:
        name: Its name on the command line and in the results.
        model: Key of :data:`came8bit.tradeoff.models.MODELS`.
        data: ``"text"``, ``"mails"``, ``"images"``, or ``"noised images"`` (inputs with noise to
            predict).
        steps: Optimizer steps.
        batch_size: Windows, mails or images per optimizer step and accumulation, over all processes
            together.
        width: Size of the model: hidden size of a transformer, channels of a convolution.
        layers, heads: Further sizes of a transformer.
        context: Bytes per window of text, tokens per mail.
        accumulate: Backward passes per optimizer step.
        warmup_steps: Steps over which the learning rate rises linearly from near 0.
        schedule: After the warm-up: ``"cosine"`` down to ``floor``, or ``"constant"``.
        floor: Where the cosine ends, as a fraction of the peak learning rate.
        eval_items: Windows, mails or images to evaluate on; fewer if the split has fewer.
        eval_every: Evaluate after each so many steps too; 0 for the end only.
        weight_decay: Decoupled; the same number for every optimizer.
        max_grad_norm: Gradients are clipped to this global norm; 0 for no clipping.
        lr_scale: The optimizers' starting learning rates are multiplied by this.
    """

    name: str
    model: str
    data: str
    steps: int
    batch_size: int
    width: int
    layers: int = 0
    heads: int = 0
    context: int = 0
    accumulate: int = 1
    warmup_steps: int = 20
    schedule: str = "cosine"
    floor: float = 0.1
    eval_items: int = 1024
    eval_every: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scale: float = 1.0

    @property
    def items(self) -> str:
        """What a batch consists of."""
        return {"text": "windows", "mails": "mails"}.get(self.data, "images")

    @property
    def batch(self) -> str:
        """What a step sees, in words."""
        long = {"text": f" × {self.context} bytes", "mails": f" mails of {self.context} tokens"}
        return f"{self.batch_size * self.accumulate}" + long.get(self.data, " images")


_TEXT = TaskConfig(
    "text", "gpt2", "text", 1000, 16, 256, 4, 4, 128, warmup_steps=200, eval_every=200
)
_VISION = TaskConfig(
    "vision", "vit", "images", 600, 64, 256, 4, 4, 0, warmup_steps=200, eval_items=10000
)
_CONVOLUTIONS: dict[str, Any] = dict(width=32, layers=0, heads=0)

#: Tasks by name, in the size that a CPU can train. A new one is an entry here and, for a new model,
#: one in ``models.MODELS``.
TASKS = {
    task.name: task
    for task in (
        _TEXT,
        replace(_TEXT, name="llama", model="llama", batch_size=64),
        _VISION,
        replace(_VISION, name="cnn", model="cnn", **_CONVOLUTIONS),
        replace(_VISION, name="ddpm", model="unet", data="noised images", **_CONVOLUTIONS),
        TaskConfig(
            *("minilm", "minilm", "mails", 100, 8, 384, 6, 12, 64),
            warmup_steps=10,
            eval_items=512,
            lr_scale=0.05,
        ),
    )
}


# ---- studies ----


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides the numbers of a study, and nothing else.

    Attributes:
        preset: Name of the preset it started from.
        tasks: The tasks, in order.
        optimizers: Keys of :data:`OPTIMIZERS`, in order; the first one is what the others are
            compared with.
        seeds: Seeds of the reported runs.
        slow_seeds: How many of the seeds the optimizers run that are slow on this device.
        tune: Search the learning rate first, with :data:`TUNE_SEEDS` and a split of its own.
        rates: Learning rates that were given, by optimizer; never searched for.
        grids: Grids that were given, by optimizer; never extended.
        equal_lr: Learning rate at which every optimizer is run as well; None for that of the first
            optimizer, 0 for none.
        margin: Losses that differ by less, in nat, count as equal.
        mixed_precision: Accelerate's: ``"no"`` or ``"bf16"``.
        cpu: Use the CPU although there is a GPU.
    """

    preset: str
    tasks: tuple[TaskConfig, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    slow_seeds: int
    tune: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    grids: dict[str, tuple[float, ...]] = field(default_factory=dict)
    equal_lr: float | None = None
    margin: float = 0.005
    mixed_precision: str = "no"
    cpu: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return asdict(self)

    def rate(self, optimizer: str) -> float:
        """Return the learning rate that is used without a search."""
        return self.rates.get(optimizer, OPTIMIZERS[optimizer].lr)

    def grid(self, optimizer: str, task: TaskConfig) -> tuple[float, ...]:
        """Return the learning rates at which the search starts."""
        spec = OPTIMIZERS[optimizer]
        middle = (spec.start or spec.lr) * task.lr_scale
        return self.grids.get(optimizer, (middle / 2, middle, 2 * middle))


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

    @property
    def key(self) -> str:
        """What tells a run from the others of its study."""
        arm = OPTIMIZERS[self.optimizer].call
        return json.dumps([self.purpose, self.task.name, self.optimizer, arm, self.seed, self.lr])


@dataclass(frozen=True)
class Preset:
    """Defaults of a study; ``about`` is shown in ``--help``."""

    about: str
    tasks: tuple[TaskConfig, ...]
    seeds: int
    slow_seeds: int
    tune: bool = True
    mixed_precision: str = "no"
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)


_QUICK: dict[str, Any] = dict(
    steps=200, batch_size=4, layers=2, context=64, warmup_steps=50, eval_items=512, eval_every=0
)
_LARGE: dict[str, Any] = dict(steps=2000, warmup_steps=400, eval_every=250)
_GPU = (
    replace(_TEXT, batch_size=32, layers=12, width=768, heads=12, context=512, **_LARGE),
    replace(_VISION, batch_size=256, layers=6, width=384, heads=6, **_LARGE),
)

PRESETS = {
    "quick": Preset(
        about="3 to 6 minutes on 2 cores: text, given learning rates",
        tasks=(replace(_TEXT, **_QUICK),),
        seeds=3,
        slow_seeds=2,
        tune=False,
        optimizers=(
            *("adamw", "adamw8bit", "came-pytorch"),
            *("came", "came8bit", "came4bit", "came2bit"),
        ),
    ),
    "standard": Preset(
        about="hours on 2 cores: text and vision, more steps and seeds, a learning-rate search",
        tasks=(_TEXT, _VISION),
        seeds=5,
        slow_seeds=3,
    ),
    "gpu": Preset(
        about="a GPU: GPT-2 small's size in bf16, and vision, with a learning-rate search",
        tasks=_GPU,
        seeds=3,
        slow_seeds=3,
        mixed_precision="bf16",
    ),
}


def preset_config(name: str) -> StudyConfig:
    """Return the study of the preset ``name``."""
    preset = PRESETS[name]
    return StudyConfig(
        preset=name,
        tasks=preset.tasks,
        optimizers=preset.optimizers,
        seeds=tuple(range(preset.seeds)),
        slow_seeds=preset.slow_seeds,
        tune=preset.tune,
        mixed_precision=preset.mixed_precision,
    )
