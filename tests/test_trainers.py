"""What training tools hand to the constructor, and what they import of ours, with fakes of them.

``docs/trainers.md`` names the tools and the versions in which their code was read.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types

import pytest
import torch
from transformers import Trainer, TrainingArguments

import came8bit
from came8bit import CAME, CAME8


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 80))


def literal(*arguments):
    """kohya's and musubi's ``--optimizer_args``."""
    return {key: ast.literal_eval(value) for key, value in (a.split("=") for a in arguments)}


def two_groups(net, **options):
    """Weights and biases, as the Trainer and its heirs separate them."""
    params = list(net.parameters())
    return [
        {"params": params[0::2], "weight_decay": 0.01, **options},
        {"params": params[1::2], "weight_decay": 0.0, **options},
    ]


TOOLS = {
    "sd-scripts": lambda net: CAME8(
        [{"params": list(net.parameters()), "lr": 1e-4}],
        lr=1e-4,
        **literal("weight_decay=0.01", "betas=(0.9,0.999,0.9999)", "optim_bits=8"),
    ),
    "sd-scripts, fused_optimizer_groups": lambda net: CAME8(
        [{"params": [p], "lr": 1e-4} for p in net.parameters()], lr=1e-4
    ),
    "musubi-tuner": lambda net: came8bit.PagedCAME8(
        list(net.parameters()), lr=1e-4, **literal("weight_decay=0.01")
    ),
    "OneTrainer": lambda net: CAME(
        params=two_groups(net, lr=1e-4, initial_lr=1e-4, name="transformer"),
        lr=1e-4,
        betas=(0.9, 0.999, 0.9999),
        eps=(1e-30, 1e-16),
        weight_decay=0.01,
        optim_bits=8,
    ),
    "SimpleTuner": lambda net: CAME8(
        net.parameters(), lr=1e-4, weight_decay=0.01, bias_correction="true"
    ),
    "diffusion-pipe": lambda net: came8bit.CAME8bit(
        two_groups(net), lr=1e-4, betas=[0.9, 0.999, 0.9999], weight_decay=0.01
    ),
    "torchtitan": lambda net: CAME(
        [
            {**group, "param_names": [f"{i}.{k}" for k in range(2)]}
            for i, group in enumerate(two_groups(net, fused=True, foreach=False))
        ],
        lr=1e-4,
        optim_bits="8",
    ),
    "torchtune": lambda net: came8bit.CAME8bit(net.parameters(), lr="1e-4"),
    "Megatron Core": lambda net: CAME(
        two_groups(net, is_expert_parallel=False, wd_mult=1.0, lr_mult=1.0, max_lr=1e-4),
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        optim_bits=8,
    ),
    "DeepSpeed": lambda net: CAME8(two_groups(net), lr=1e-4, betas=[0.9, 0.999, 0.9999]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_hands_to_the_constructor(tool):
    net = layers()
    optimizer = TOOLS[tool](net)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(4, 80)).square().sum().backward()
    optimizer.step()
    assert all((p != q).any() for p, q in zip(net.parameters(), before, strict=True))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4}
    assert {group["optim_bits"] for group in optimizer.param_groups} == {8}
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.int8
    beta3 = {group["betas"][2] for group in optimizer.param_groups}
    assert beta3 == {0.9999}


def test_adams_eps_is_refused_with_the_line_to_write():
    with pytest.raises(ValueError, match=r"eps=\(1e-30, 1e-16\)"):  # ai-toolkit's
        CAME8(layers().parameters(), lr=1e-4, eps=1e-6)


def test_deepspeed_puts_a_flat_vector_in_the_place_of_a_group():
    net = layers()
    optimizer = CAME8(net.parameters(), lr=1e-4)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    assert set(optimizer.state) == {flat}


# --- came8bit.integrations ------------------------------------------------------------------------


def fake(monkeypatch, name, **contents):
    """Put a module ``name`` with ``contents`` where imports find it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[name]).update(contents)


@pytest.fixture
def integration(monkeypatch):
    """Import a module of ``came8bit.integrations``, anew and for this test only."""

    def load(name):
        name = f"came8bit.integrations.{name}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load


class Config(dict):
    """axolotl's: what is missing is None."""

    __getattr__ = dict.get


AXOLOTL = {
    "plain": ({"learning_rate": 1e-4}, {"lr": 1e-4, "optim_bits": 8}),
    "all": (
        {"learning_rate": "2e-4", "weight_decay": 0.1, "adam_beta2": 0.99}
        | {"optim_args": "seed=3, optim_bits=4"},
        {"lr": 2e-4, "weight_decay": 0.1, "betas": (0.9, 0.99, 0.9999), "optim_bits": 4, "seed": 3},
    ),
    "mapping": (
        {"learning_rate": 1e-4, "optim_args": {"bias_correction": True}},
        {"lr": 1e-4, "bias_correction": True, "optim_bits": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AXOLOTL)
def test_axolotl(monkeypatch, integration, name):
    fake(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    cfg, expected = AXOLOTL[name]
    trainer = types.SimpleNamespace()
    integration("axolotl").CAME8bitPlugin().post_trainer_create(Config(cfg), trainer)
    cls, options = trainer.optimizer_cls_and_kwargs
    optimizer = cls(layers().parameters(), **options)
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_ms_swift(monkeypatch, integration, tmp_path):
    class OptimizerCallback:
        def __init__(self, args, trainer):
            self.args, self.trainer = args, trainer

        def create_optimizer(self, model=None):
            return Trainer.create_optimizer(
                self.trainer, **({} if model is None else {"model": model})
            )

    made = {}
    fake(monkeypatch, "swift.optimizers", OptimizerCallback=OptimizerCallback, optimizers_map=made)
    integration("swift")
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, weight_decay=0.1, use_cpu=True)
    trainer = Trainer(layers(), args)
    optimizer = made["came8bit"](args, trainer).create_optimizer()
    assert type(optimizer) is came8bit.CAME8bit
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (3e-4, 0.1),
        (3e-4, 0),
    ]


def test_llama_factory(monkeypatch, integration):
    made = {}

    class OptimizerPlugin:
        def __init__(self, name):
            self.name = name

        def register(self):
            return lambda function: made.setdefault(self.name, function)

    place = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    fake(monkeypatch, place, OptimizerPlugin=OptimizerPlugin)
    integration("llamafactory")
    net = layers()
    net[0].weight.requires_grad_(False)
    optimizer = made["came8bit"](net, {"name": "came8bit", "lr": 1e-4, "weight_decay": 0.1})
    assert [len(g["params"]) for g in optimizer.param_groups] == [3]
    assert optimizer.param_groups[0]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["optim_bits"] == 8


def train_with(folder, *, in_backward, parts, rows=6, **arguments):
    """Three steps of a Trainer; return its log and the parameters that it ends with."""
    from came8bit.integrations.transformers import CAMECallback

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers()

        def forward(self, x, labels=None):
            return {"loss": self.layers(x).sub(labels).square().mean()}

    generator = torch.Generator().manual_seed(1)
    data = [
        dict.fromkeys(("x", "labels"), torch.randn(80, generator=generator)) for _ in range(rows)
    ]
    arguments = {"max_steps": 3, "max_grad_norm": 0.0, "report_to": "none", **arguments}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 1}
    args = TrainingArguments(
        str(folder),
        gradient_accumulation_steps=parts,
        logging_steps=1,
        save_strategy="no",
        **arguments,
    )
    trainer = Trainer(
        Net(), args, train_dataset=data, optimizer_cls_and_kwargs=(CAME8, {"lr": 1e-3})
    )
    CAMECallback(step_in_backward=in_backward).attach(trainer)
    trainer.train()
    log = [
        {k: e[k] for k in ("loss", "grad_norm", "skipped_steps")}
        for e in trainer.state.log_history[:-1]
    ]
    return log, list(trainer.model.parameters())


@pytest.mark.parametrize(("parts", "rows"), [(1, 6), (3, 10), (4, 6)])
def test_the_callback_of_transformers(tmp_path, parts, rows):
    """Step in backward changes nothing but the memory: same bits, and the same norm in the log."""
    log, expected = train_with(tmp_path, in_backward=False, parts=parts, rows=rows)
    mine, params = train_with(tmp_path, in_backward=True, parts=parts, rows=rows)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    for entry, other in zip(mine, log, strict=True):
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        assert {**entry, "grad_norm": 0} == {**other, "grad_norm": 0}
        assert entry["skipped_steps"] == 0


def test_the_callback_refuses_to_clip(tmp_path):
    with pytest.raises(ValueError, match="set max_grad_norm=0"):
        train_with(tmp_path, in_backward=True, parts=1, max_grad_norm=1.0)


# --- TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(tmp_path, kind, in_backward):
    """SFTTrainer has the argument, DPOTrainer takes it as an attribute."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate("_.abcdefgh")}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="_", eos_token=".")

    def llama():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=10, num_attention_heads=2, **sizes))

    args = getattr(trl, f"{kind}Config")(
        tmp_path, max_steps=6, logging_steps=1, max_grad_norm=0.0, use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True, max_length=16,
    )  # fmt: skip
    how = (came8bit.CAME8bit, {"lr": 2e-3})
    if kind == "SFT":
        rows = {"text": ["a b c d e f g h"] * 16}
        more = {"optimizer_cls_and_kwargs": how}
    else:
        rows = {"prompt": ["a b"] * 16, "chosen": [" c d"] * 16, "rejected": [" h g"] * 16}
        more = {"ref_model": llama()}
    trainer = getattr(trl, f"{kind}Trainer")(
        llama(), args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer,
        **more,
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = how
    if in_backward:
        from came8bit.integrations.transformers import CAMECallback

        CAMECallback(step_in_backward=True).attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert type(trainer.optimizer.optimizer) is came8bit.CAME8bit
    assert losses[-1] < 0.8 * losses[0]
