"""PEFT: adapters on a base in 4 bits, which is frozen and stays as it is."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import TOKENS, batch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from came8bit import CAME8bit

CAME = (CAME8bit, {"lr": 1e-2, "bias_correction": True})


def make_model(folder: Path) -> torch.nn.Module:
    """Return a small Llama, loaded in 4 bits, with adapters of rank 32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=TOKENS, num_hidden_layers=1, num_key_value_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    base = LlamaForCausalLM.from_pretrained(
        folder / "base", quantization_config=four_bits, device_map="cpu"
    )
    adapters = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, adapters)


def train(steps: int, folder: Path, optimizer=CAME) -> tuple[list[float], torch.nn.Module]:
    """Train to ``steps``, from the checkpoint in ``folder`` if there is one."""
    folder.mkdir(exist_ok=True)
    model, (cls, options) = make_model(folder), optimizer
    # All parameters: those that are frozen may have any dtype, and take no state.
    optimizer = cls(model.parameters(), **options)
    first, file = 0, folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file)
        first = saved["step"]
        set_peft_model_state_dict(model, saved["adapters"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for step in range(first, steps):
        tokens = batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {"adapters": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
    torch.save({"step": steps, **state}, file)
    return losses, model


if __name__ == "__main__":
    print(train(24, Path(sys.argv[1] if len(sys.argv) > 1 else "out"))[0])
