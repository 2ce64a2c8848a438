"""Accelerate: prepare, accumulate, clip, save_state and load_state.

In two processes: ``torchrun --nproc_per_node 2 examples/accelerate_loop.py out 24``.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny import batch, loss_of, make_model

from came8bit import CAME8bit

CAME = (CAME8bit, {"lr": 3e-3, "bias_correction": True})


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from what is in ``folder`` if there is something."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, (cls, options) = make_model(), optimizer
    optimizer = cls(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, total_iters=4)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    first, state = 0, folder / "state"
    if state.exists():
        accelerator.load_state(state)
        first = torch.load(folder / "step.pt")
    losses = []
    for step in range(first, steps):
        for part in range(2):
            number = 2 * step + part
            tokens = batch(number * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(model):
                loss = loss_of(model, tokens)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.save_state(state)
    if accelerator.is_main_process:
        torch.save(steps, folder / "step.pt")
    return losses, accelerator.unwrap_model(model)


if __name__ == "__main__":
    folder, steps = sys.argv[1:] if len(sys.argv) == 3 else ("out", "24")
    losses, model = train(int(steps), Path(folder))
    print(losses[-1], float(sum(p.double().sum() for p in model.parameters())))
