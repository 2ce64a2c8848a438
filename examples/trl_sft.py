"""SFTTrainer of TRL: class and options of the optimizer, checkpoints, resuming."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import TOKENS, batch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from came8bit import CAME8bit
from came8bit.integrations.transformers import CAMECallback

CAME = (CAME8bit, {"lr": 3e-3, "weight_decay": 0.01, "bias_correction": True})


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the last checkpoint in ``folder`` if it has one."""
    torch.manual_seed(0)
    # A word for every token, and one for padding.
    vocabulary = {str(i): i for i in range(TOKENS)} | {"pad": TOKENS}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="pad"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="pad")
    config = LlamaConfig(
        vocab_size=TOKENS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    rows = [row.tolist() for step in range(64) for row in batch(step, size=8)]
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        args=SFTConfig(
            str(folder),
            max_steps=steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            save_steps=8,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows]}),
        processing_class=tokenizer,
        # The learning rate is not taken from SFTConfig: name it here. Trainers of TRL without this
        # argument take it as an attribute, set before train().
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[CAMECallback()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
