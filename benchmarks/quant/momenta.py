"""Momenta of real trainings: small models on real data, with CAME's momentum in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from came8bit import CAME
from came8bit.tradeoff.config import TaskConfig
from came8bit.tradeoff.data import load_images, load_text, train_items
from came8bit.tradeoff.models import build_model

BETA1 = 0.9
SMALLEST = 4096  # elements; what CAME8bit keeps in 8 bits

GPT = TaskConfig("text", "gpt2", "text", 100, 8, width=128, layers=2, heads=4, context=64)
VIT = TaskConfig("vision", "vit", "images", 100, 16, width=96, layers=2, heads=4)
CNN = TaskConfig("cnn", "cnn", "images", 100, 32, width=32)


@dataclass
class Momenta:
    """What one training leaves for the comparison.

    Attributes:
        about: Model and data, in a few words.
        losses: Training loss at the first and the last step.
        history: Momenta of every matrix after each of the last steps, by name of the parameter.
        confidence: What the last step multiplied each of them by, up to a constant per matrix.
    """

    about: str
    losses: tuple[float, float]
    history: list[dict[str, Tensor]]
    confidence: dict[str, Tensor]

    @property
    def final(self) -> dict[str, Tensor]:
        """Momenta after the last step."""
        return self.history[-1]

    def updates(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return what each of the last steps added to ``beta1*m``, and where it added nothing."""
        steps = [m[name] for m in self.history]
        pairs = []
        for before, after in itertools.pairwise(steps):
            decayed = before * torch.tensor(BETA1)
            pairs.append((after - decayed, after == decayed))
        return pairs


class Cnn(nn.Module):
    """Three 3x3 convolutions, each with pooling, and two linear layers; for 28x28 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for i in range(3):
            out = width << i
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        layers += [nn.Flatten(), nn.Linear(9 * channels, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(batch, 10)`` of images ``(batch, 1, 28, 28)``."""
        return self.net(x)


def trainings(data_dir: Path) -> dict[str, Callable[[int, int], Momenta]]:
    """Trainings by name: functions of the seed and of how many steps to keep.

    They raise ``ValueError`` where their data are not there.
    """
    return {
        "GPT": lambda seed, keep: _train(GPT, _transformer, 1e-4, data_dir, seed, keep),
        "CNN": lambda seed, keep: _train(CNN, _cnn, 5e-4, data_dir, seed, keep),
        "ViT": lambda seed, keep: _train(VIT, _transformer, 1e-4, data_dir, seed, keep),
    }


def _transformer(task: TaskConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = build_model(task)
    return model, lambda x: model(x).logits


def _cnn(task: TaskConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = Cnn(task.width)
    return model, model


def _train(
    task: TaskConfig,
    build: Callable[[TaskConfig], tuple[nn.Module, Callable[[Tensor], Tensor]]],
    lr: float,
    data_dir: Path,
    seed: int,
    keep: int,
) -> Momenta:
    text = task.data == "text"
    data = load_text(None, "stdlib", data_dir) if text else load_images(data_dir)
    torch.manual_seed(seed)
    model, scores = build(task)
    matrices = {
        name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.numel() >= SMALLEST
    }
    optimizer = CAME(model.parameters(), lr=lr, betas=(BETA1, 0.999, 0.9999))
    batches = torch.utils.data.DataLoader(train_items(data, task, seed), task.batch_size)
    losses, history = [], []
    for step, (inputs, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / task.warmup_steps)
        loss = nn.functional.cross_entropy(scores(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), task.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if step >= task.steps - keep - 1:
            state = {name: optimizer.state[p]["exp_avg"] for name, p in matrices.items()}
            history.append({name: m.clone() for name, m in state.items()})
    count = sum(p.numel() for p in matrices.values())
    about = f"{data.about['source']}, {len(matrices)} matrices of {count:,} parameters"
    confidence = {name: _confidence(optimizer.state[p], p) for name, p in matrices.items()}
    return Momenta(about, (losses[0], losses[-1]), history, confidence)


def _confidence(state: dict[str, Tensor], param: Tensor) -> Tensor:
    """``1/sqrt(R_i C_j)`` from the instability, in the parameter's shape."""
    rows, columns = state["exp_avg_res_row"], state["exp_avg_res_col"]
    return (rows.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)).view(param.shape)
