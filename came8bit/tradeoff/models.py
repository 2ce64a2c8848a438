"""The models, with new weights: how each is built, trained and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TaskConfig

#: Model, inputs, targets → the loss of each item (fp32, shape (batch,)) and the share of right
#: answers in each item, or None where there is no right answer.
Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and hits of a classifier, means over the bytes of a window for text."""
    output = model(inputs)
    scores = getattr(output, "logits", output)  # (batch, [context,] classes)
    losses = F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten(), reduction="none")
    hits = (scores.argmax(dim=-1) == targets).float()
    return losses.view(len(targets), -1).mean(dim=1), hits.view(len(targets), -1).mean(dim=1)


def squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    """Return each item's mean squared error."""
    return (model(inputs).float() - targets).square().flatten(1).mean(dim=1), None


@dataclass(frozen=True)
class ModelSpec:
    """A kind of model.

    Attributes:
        about: Its name in a few words; filled in with the fields of the task.
        build: Makes it with weights drawn from torch's generator. No dropout: the runs are short,
            and every optimizer then sees the same function.
        losses: The loss that is trained and reported.
        unit: The loss's unit.
    """

    about: str
    build: Callable[[TaskConfig], nn.Module]
    losses: Losses = cross_entropy
    unit: str = "nat per image"

    def describe(self, task: TaskConfig) -> str:
        """Name the model in a few words."""
        return self.about.format(task=task)


def build_model(task: TaskConfig, weights: Path | None = None) -> nn.Module:
    """Build the task's model, with new weights where the safetensors file has none."""
    model = MODELS[task.model].build(task)
    if weights is not None:
        from safetensors.torch import load_file

        # The head is new, and the file has no prefix.
        found = {f"bert.{name}": value for name, value in load_file(weights).items()}
        rest = model.load_state_dict(found, strict=False).missing_keys
        if rest != ["classifier.weight", "classifier.bias"]:
            raise ValueError(f"{weights}: got no weights for {', '.join(rest)}")
    return model


def _minilm(task: TaskConfig) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=4 * task.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 2
    model: nn.Module = BertForSequenceClassification(config)
    model.register_forward_pre_hook(
        lambda model, inputs, options: (inputs, {**options, "attention_mask": inputs[0] != 0}),
        with_kwargs=True,
    )
    return model


def _gpt2(task: TaskConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=task.context,
        n_embd=task.width,
        n_layer=task.layers,
        n_head=task.heads,
        activation_function="gelu_pytorch_tanh",  # the variant that torch has in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _llama(task: TaskConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        max_position_embeddings=task.context,
        hidden_size=task.width,
        intermediate_size=8 * task.width // 3,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _vit(task: TaskConfig) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=4 * task.width,
        hidden_act="gelu",
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    model: nn.Module = ViTForImageClassification(config)
    return model


class _Residual(nn.Module):
    """Two 3×3 convolutions with group norm around a shortcut; ``condition`` shifts the channels."""

    def __init__(self, inner: int, outer: int, condition: int = 0) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1)
        )
        self.shift = nn.Linear(condition, outer) if condition else None
        self.second = nn.Sequential(
            nn.GroupNorm(8, outer), nn.SiLU(), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if self.shift is not None:
            hidden = hidden + self.shift(condition)[:, :, None, None]
        out: Tensor = self.shortcut(x) + self.second(hidden)
        return out


def _cnn(task: TaskConfig) -> nn.Module:
    c = task.width
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        _Residual(c, c),
        nn.AvgPool2d(2),
        _Residual(c, 2 * c),
        nn.AvgPool2d(2),
        _Residual(2 * c, 4 * c),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * c, 10),
    )


class UNet(nn.Module):
    """The U-Net of denoising diffusion at 28, 14 and 7 pixels a side, without attention.

    Takes (batch, 2, 28, 28): the noised image, and a plane that holds the time in [0, 1). Returns
    the predicted noise, (batch, 1, 28, 28).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sides, self.width, time = (width, 2 * width, 4 * width), width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(
            _Residual(a, b, time) for a, b in zip((width, *sides), sides, strict=False)
        )
        self.middle = _Residual(4 * width, 4 * width, time)
        self.up = nn.ModuleList(
            _Residual(a + b, b, time)
            for a, b in zip((4 * width, *sides[:0:-1]), sides[::-1], strict=True)
        )
        self.leave = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        waves = torch.arange(self.width // 2, device=inputs.device) / (self.width // 2)
        angles = 1000 * inputs[:, 1, 0, :1] * torch.exp(-math.log(1e4) * waves)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        x, kept = self.enter(inputs[:, :1]), []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x, time)
            kept.append(x)
        x = self.middle(x, time)
        for level, block in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2.0) if level else x
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        out: Tensor = self.leave(x)
        return out


_SIZE = "{task.layers} layers × {task.width}"

MODELS = {
    "gpt2": ModelSpec(
        f"byte-level GPT-2, {_SIZE}, context {{task.context}}", _gpt2, unit="nat per byte"
    ),
    "llama": ModelSpec(
        f"byte-level Llama, {_SIZE}, context {{task.context}}", _llama, unit="nat per byte"
    ),
    "vit": ModelSpec(f"ViT, {_SIZE}, patches of 4×4", _vit),
    "cnn": ModelSpec("residual CNN, {task.width} channels", _cnn),
    "minilm": ModelSpec(
        "pretrained MiniLM, {task.layers} layers × {task.width}", _minilm, unit="nat per mail"
    ),
    "unet": ModelSpec(
        "denoising U-Net, {task.width} channels",
        lambda task: UNet(task.width),
        squared_error,
        "squared error of the noise",
    ),
}
