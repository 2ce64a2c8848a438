"""PyTorch Lightning, manual optimization: step in backward, by a closure."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batch, loss_of, make_model
from torch.utils.data import DataLoader

import came8bit

CAME = (came8bit.CAME8bit, {"lr": 3e-3, "bias_correction": True})
EPOCH = 8  # batches


class Module(L.LightningModule):
    """A model whose ``backward()`` updates each parameter and frees its gradient."""

    def __init__(self, optimizer=CAME):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.optimizer, self.losses = make_model(), optimizer, []

    def configure_optimizers(self):
        """Return the optimizer."""
        cls, options = self.optimizer
        return cls(self.model.parameters(), **options)

    def on_fit_start(self):
        """Step in backward from now on, where the optimizer can."""
        if issubclass(self.optimizer[0], came8bit.CAME):
            self.release = came8bit.step_in_backward(self.optimizers())

    def training_step(self, tokens, index):
        """Take a step; the closure's ``backward()`` makes the updates."""
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = loss_of(self.model, tokens)
            self.manual_backward(loss)
            return loss

        self.losses.append(optimizer.step(closure=closure).item())


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    module, last = Module(optimizer), folder / "last.ckpt"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=steps // EPOCH,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, save_last=True)],
        **quiet,
    )
    loader = DataLoader([batch(step) for step in range(EPOCH)], batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=False)
    return module.losses, module.model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
