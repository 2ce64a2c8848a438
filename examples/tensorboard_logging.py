"""TensorBoard: learning rate, size of the updates, norm of the gradients, skipped updates.

Look at it with ``tensorboard --logdir out``.
"""

import sys
from pathlib import Path

import torch
from tiny import batch, loss_of, make_model
from torch.utils.tensorboard import SummaryWriter

import came8bit

CAME = (came8bit.CAME8bit, {"lr": 3e-3, "bias_correction": True})


def rms_of_update(before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
    """Return the root of the mean square of what a step has added; near the learning rate."""
    squares = [(new - old).square().sum() for old, new in zip(before, after, strict=True)]
    return (sum(squares) / sum(p.numel() for p in before)).sqrt()


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    model, (cls, options) = make_model(), optimizer
    optimizer = cls(model.parameters(), **options)
    params = list(model.parameters())
    first, file = 0, folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    with SummaryWriter(folder) as writer:
        for step in range(first, steps):
            loss = loss_of(model, batch(step))
            loss.backward()
            log = step % 4 == 0
            before = [p.detach().clone() for p in params] if log else []
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if log:
                writer.add_scalar("loss", losses[-1], step)
                writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)
                writer.add_scalar(
                    "update_rms", rms_of_update(before, [p.detach() for p in params]), step
                )
                if isinstance(optimizer, came8bit.CAME):
                    writer.add_scalar("grad_norm", optimizer.grad_norm(), step)
                    writer.add_scalar("skipped_steps", optimizer.skipped_steps(), step)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"step": steps, **state}, file)
    return losses, model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
