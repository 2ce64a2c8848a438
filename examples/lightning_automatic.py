"""PyTorch Lightning: return the optimizer from ``configure_optimizers``."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batch, loss_of, make_model
from torch.utils.data import DataLoader

from came8bit import CAME8bit

CAME = (CAME8bit, {"lr": 3e-3, "bias_correction": True})
EPOCH = 8  # batches


class Module(L.LightningModule):
    """A model, its loss and its optimizer."""

    def __init__(self, optimizer=CAME):
        super().__init__()
        self.model, self.optimizer, self.losses = make_model(), optimizer, []

    def training_step(self, tokens, index):
        """Return the loss; Lightning does the rest."""
        loss = loss_of(self.model, tokens)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """Return optimizer and scheduler."""
        cls, options = self.optimizer
        optimizer = cls(self.model.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, total_iters=4)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    module, last = Module(optimizer), folder / "last.ckpt"
    trainer = L.Trainer(
        max_epochs=steps // EPOCH,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader([batch(step) for step in range(EPOCH)], batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=False)
    return module.losses, module.model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
