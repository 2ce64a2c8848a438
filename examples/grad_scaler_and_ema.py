"""A loop in plain PyTorch: autocast with a GradScaler, an average of the weights, a scheduler."""

import sys
from pathlib import Path

import torch
from tiny import batch, loss_of, make_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from came8bit import CAME8bit

CAME = (CAME8bit, {"lr": 3e-3, "bias_correction": True})


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    model, (cls, options) = make_model(), optimizer
    optimizer = cls(model.parameters(), **options)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "average": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100),
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10),
    }
    first, file = 0, folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file)
        first = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    scaler, losses = parts["scaler"], []
    for step in range(first, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        parts["scheduler"].step()
        parts["average"].update_parameters(model)
        losses.append(loss.item())
    folder.mkdir(exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": steps, **state}, file)
    return losses, parts["average"]


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
