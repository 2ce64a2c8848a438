"""Every scheduler of torch: made, stepped, saved and loaded as with any optimizer."""

import sys
from functools import partial
from pathlib import Path

import torch
from tiny import batch, loss_of, make_model
from torch.optim import lr_scheduler as lr

from came8bit import CAME8bit

CAME = (CAME8bit, {"lr": 3e-3, "bias_correction": True})

SCHEDULERS = {
    "LambdaLR": partial(lr.LambdaLR, lr_lambda=[lambda step: 0.98**step]),
    "MultiplicativeLR": partial(lr.MultiplicativeLR, lr_lambda=[lambda step: 0.98]),
    "StepLR": partial(lr.StepLR, step_size=5),
    "MultiStepLR": partial(lr.MultiStepLR, milestones=[4, 9]),
    "ConstantLR": partial(lr.ConstantLR, factor=0.5),
    "LinearLR": partial(lr.LinearLR, start_factor=0.1, total_iters=5),
    "ExponentialLR": partial(lr.ExponentialLR, gamma=0.95),
    "CosineAnnealingLR": partial(lr.CosineAnnealingLR, T_max=30),
    "PolynomialLR": partial(lr.PolynomialLR, total_iters=30),
    "CosineAnnealingWarmRestarts": partial(lr.CosineAnnealingWarmRestarts, T_0=7),
    "CyclicLR": partial(lr.CyclicLR, base_lr=1e-3, max_lr=5e-3, step_size_up=5),
    "OneCycleLR": partial(lr.OneCycleLR, max_lr=5e-3, total_steps=100),
    "ReduceLROnPlateau": partial(lr.ReduceLROnPlateau, patience=2),
    "SequentialLR": lambda optimizer: lr.SequentialLR(
        optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=5), lr.StepLR(optimizer, 5)], [5]
    ),
    "ChainedScheduler": lambda optimizer: lr.ChainedScheduler(
        [lr.LinearLR(optimizer, 0.1, total_iters=5), lr.ExponentialLR(optimizer, 0.95)]
    ),
}


def train(
    steps: int, folder: Path, optimizer=CAME, scheduler: str = "OneCycleLR"
) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    model, (cls, options) = make_model(), optimizer
    optimizer = cls(model.parameters(), **options)
    schedule = SCHEDULERS[scheduler](optimizer)
    first, file = 0, folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    losses = []
    for step in range(first, steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        schedule.step(*[loss.item()] if scheduler == "ReduceLROnPlateau" else [])
        losses.append(loss.item())
    folder.mkdir(exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({"step": steps} | {name: part.state_dict() for name, part in parts.items()}, file)
    return losses, model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
