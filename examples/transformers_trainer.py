"""Trainer of transformers: class and options of the optimizer, checkpoints, resuming."""

import sys
from pathlib import Path

import torch
from tiny import TOKENS, batch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from came8bit import CAME8bit
from came8bit.integrations.transformers import CAMECallback

CAME = (CAME8bit, {"lr": 3e-3, "weight_decay": 0.01, "bias_correction": True})


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the last checkpoint in ``folder`` if it has one."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=64,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    rows = [row for step in range(64) for row in batch(step, size=4)]
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            str(folder),
            max_steps=steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            save_steps=8,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        # The learning rate is not taken from TrainingArguments: name it here.
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[CAMECallback()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
