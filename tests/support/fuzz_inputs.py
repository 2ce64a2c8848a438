"""Hands strange input to the planner, the optimizers and the command line; run as a program.

``python fuzz_inputs.py KIND SEED COUNT [SECONDS]`` prints how many inputs were refused and how many
were taken, of COUNT or as many as it manages in SECONDS; :data:`KINDS` has the kinds and what each
promises. A broken promise, a crash, more than 2 GiB or 30 seconds of work for an input end the
program; its last line names the input.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fuzz_checkpoints import VALUES, damaged, limit_memory, limited_time, numbers, places
from problems import assert_same_bits

from came8bit import CAME, save_checkpoint
from came8bit.cli import build_parser, main
from came8bit.ops import libraries
from came8bit.tradeoff import study

SECONDS, MEMORY = 30, 2 << 30

Promise = Callable[[random.Random, Path], bool]
"""Makes an input and tries it; tells whether it was taken."""


def command(*words: object) -> int:
    """Exit code of a command line, which always ends with one and says what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    assert code in (0, 1, 2), (code, words)
    last = err.getvalue().splitlines()[-1:]
    assert code != 2 or (last and "error: " in last[0] and last[0].isprintable()), (words, last)
    return code


# --- the planner's files --------------------------------------------------------------------------

LLAMA = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=256, max_position_embeddings=64,
    rope_scaling=None, architectures=["LlamaForCausalLM"], eos_token_id=2, hidden_act="silu",
)  # fmt: skip
GPT2 = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL["architectures"] = ["MixtralForCausalLM"]
BERT = dict(
    model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
    intermediate_size=64, vocab_size=64, architectures=["BertForSequenceClassification"],
    id2label={"0": "a", "1": "b", "2": "c"},
)  # fmt: skip
SMALL = [1, 2, 3, 4, 8, 16, 24, None, True, 0.5]  # more layers take more time to trace
SIZES = ["64", "many", 3, 7, 1000, 1001, 4096, 100_000, 2**24, 2**31, 2**63, 0.5, 1e-9, [1000] * 9]


def config(choose: random.Random, folder: Path) -> bool:
    """A config.json with values that make no sense, or damaged text."""
    made = copy.deepcopy(choose.choice([LLAMA, GPT2, MIXTRAL, BERT]))
    for _ in range(choose.choice([1, 1, 2, 3])):
        where, key = choose.choice(list(places(made)))
        where[key] = copy.deepcopy(
            choose.choice(VALUES + SIZES if choose.random() < 0.5 else SMALL)
        )
    text = json.dumps(made).encode()
    path = folder / "config.json"
    path.write_bytes(damaged(text, choose) if choose.random() < 0.2 else text)
    return command("estimate", path, "--sequence", 16, "--optimizers", "adamw,came8bit") == 0


def header(choose: random.Random, folder: Path) -> bool:
    """A safetensors file whose header is damaged, or says what is not so."""
    shapes = {"model.embed_tokens.weight": [64, 32], "h.0.weight": [32, 32], "h.0.bias": [32]}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    lies = choose.random() < 0.6
    if lies:
        where, key = choose.choice(list(places(table)))
        where[key] = copy.deepcopy(choose.choice([*VALUES, *SIZES, "F32", "I8", [2, 512]]))
    text = json.dumps(table).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(at)
    path = folder / "model.safetensors"
    path.write_bytes(content if lies else damaged(content, choose))
    return command("estimate", path, "--optimizers", "adamw,came8bit") == 0


# --- options and gradients ------------------------------------------------------------------------

OPTIONS: dict[str, list[object]] = {
    "lr": [1e-3, 0, 1, 10.0, "1e-3", 1e-45, torch.tensor(1e-3), torch.tensor([1e-2])],
    "betas": [(0.9, 0.999, 0.9999), (0, 0, 0), [0.9, 0.95], "0.9", (0.9, "0.99", 0.999), (0.5,)],
    "eps": [(1e-30, 1e-16), (1e-45, 1e-45), (1, 1), 1e-8, ("1e-30", "1e-16"), (1e-8, 1e-3)],
    "clip_threshold": [1.0, math.inf, 1e-30, 1e30, "0.5", 3],
    "weight_decay": [0, 0.01, 1, "0.1", 0.5],
    "optim_bits": [8, 32, 4, 2, 0, "8", 8.0, 16],
    "min_8bit_size": [0, 4096, 1e3, "0", 2**62],
    "rounding": ["stochastic", "nearest", "up"],
    "cautious": [True, False, "true", 1],
    "nonfinite": ["skip", "propagate", "raise", None],
    "maximize": [True, False, "False"],
    "bias_correction": [True, False, "yes"],
    "nesterov": [True, False, 0],
    "factored_view": ["smallest", "last_two", "first"],
    "seed": [0, 1, 2**63 - 1, 2**64, -1, "7"],
    "stream": [None, 0, 2**31, 2**32, "3"],
    "is_paged": [True, False, None],
    "foreach": [None, False, True],
    "capturable": [False, True],
    "nonesuch": [1],
}
STRANGE: list[object] = [
    None, True, "", "nan", "1e400", math.nan, math.inf, -math.inf, -1, -0.0, 1e38, 3.5e38, 1e-320,
    2**70, 10**400, 1j, (), [], {}, (1, 2, 3, 4), b"1", object, torch.tensor(math.nan),
    torch.ones(3), torch.tensor(1e-3, dtype=torch.float64), torch.tensor(2),
]  # fmt: skip
SHAPES = [(64, 64), (9, 300), (300,), (), (1, 7), (3, 5, 40), (0, 4), (6, 4, 3, 3), (2, 256)]
SPECIAL = [math.nan, math.inf, -math.inf, 3.4e38, 1e-45, 1e-38, -0.0, 1e19, 1e-20, 1.0]


def gradient(param: torch.Tensor, choose: random.Random) -> torch.Tensor:
    generator = torch.Generator().manual_seed(choose.randrange(2**31))
    grad = torch.randn(param.shape, generator=generator) * choose.choice([1.0, 1e-20, 1e18, 0.0])
    if grad.numel() and choose.random() < 0.5:
        places = torch.randint(grad.numel(), (choose.choice([1, 3, 10**4]),), generator=generator)
        grad.view(-1)[places] = choose.choice(SPECIAL)
    return grad.to(param.dtype)


def options(choose: random.Random, folder: Path) -> bool:
    """Refused before anything changes, or the bits of the reference and finite parameters."""
    names = choose.sample(list(OPTIONS), choose.choice([1, 2, 3, 6]))
    chosen = {
        name: choose.choice(OPTIONS[name] if choose.random() < 0.8 else STRANGE) for name in names
    }
    dtype = choose.choice([torch.float32, torch.bfloat16, torch.float16])
    started = [torch.randn(shape).to(dtype) * 0.1 for shape in choose.sample(SHAPES, 3)]
    steps = [[gradient(param, choose) for param in started] for _ in range(2)]
    try:
        CAME(map(torch.nn.Parameter, started), **copy.deepcopy(chosen))
    except (ValueError, TypeError):
        return False
    mine = after_steps(started, steps, chosen)
    with mock.patch.object(libraries, "needs_reference", return_value=True):
        expected = after_steps(started, steps, chosen)
    for got, other in zip(mine, expected, strict=True):
        assert_same_bits(got, other, str(chosen))
        finite = bool(got["param"].isfinite().all())
        assert finite or chosen.get("nonfinite") == "propagate" or dtype == torch.float16, chosen
    return True


def after_steps(
    started: list[torch.Tensor], steps: list[list[torch.Tensor]], chosen: dict[str, object]
) -> list[dict[str, torch.Tensor]]:
    """Parameters and state after steps, of which a refused one has changed nothing."""
    params = [torch.nn.Parameter(param.clone()) for param in started]
    optimizer = CAME(params, **copy.deepcopy(chosen))
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        before = [param.detach().clone() for param in params]
        try:
            optimizer.step()
        except (ValueError, TypeError, FloatingPointError) as error:
            # That an update is not finite turns out when others have been made.
            if not str(error).startswith("the update of parameter"):
                assert all(map(torch.equal, params, before)), chosen
    return [{"param": p.detach(), **optimizer._store.read(p)} for p in params]


# --- command lines --------------------------------------------------------------------------------

WORDS = [
    "", "-", "--", "-h", "--help", "--version", "--nonesuch", "0", "1", "-1", "8", "1e9", "nan",
    "inf", "9" * 400, "2147483648", "0.5", "32", "came8bit", "adamw,came8bit", "came8bit=1e-3",
    "came8bit=nan", "nonesuch", "gpt", "bf16", "quick", "\x1b[2J", "\u202e", "a\nb", "é",
    ".", "..", "\udcff", "a\0b", "x" * 5000, "~", "new",
]  # fmt: skip


def arguments(choose: random.Random, folder: Path) -> bool:
    """Any command line ends with 0, 1 or 2, and an error that is one sentence."""
    if not (folder / "files").exists():
        _write_files(folder)
    paths = sorted(folder.joinpath("files").iterdir())
    commands = build_parser()._subparsers._group_actions[0].choices
    chosen = choose.choice(list(commands))
    actions = commands[chosen]._actions
    words: list[object] = [chosen] if choose.random() < 0.95 else []
    for _ in range(choose.randrange(7)):
        action = choose.choice(actions)
        if action.option_strings and choose.random() < 0.8:
            words.append(choose.choice(action.option_strings))
        if choose.random() < 0.8:
            words.append(choose.choice([*(action.choices or ()), *WORDS, *paths]))
        else:
            words.append(choose.choice(paths))
    with mock.patch.object(study, "run_study", return_value=None):  # would train for hours
        return command(*words) == 0


def _write_files(folder: Path) -> None:
    files = folder / "files"
    files.mkdir()
    (files / "config.json").write_text(json.dumps(GPT2))
    (files / "text").write_bytes(b"Some text to train on. " * 400)
    (files / "empty.safetensors").write_bytes(b"")
    optimizer = CAME([torch.nn.Parameter(torch.ones(4, 4))])
    optimizer.materialize()
    save_checkpoint(optimizer, files / "state.safetensors")
    torch.save(optimizer.state_dict(), files / "state.pt")
    content = (files / "state.safetensors").read_bytes()
    (files / "short.safetensors").write_bytes(content[:-3])
    os.mkfifo(files / "fifo.json")
    (files / "folder").mkdir()
    (files / "gone.json").symlink_to("nowhere")


KINDS: dict[str, Promise] = {
    "config": config,
    "header": header,
    "options": options,
    "arguments": arguments,
}


def fuzz(kind: str, seed: int, count: int, seconds: float = math.inf) -> None:
    """Try ``count`` inputs, or for ``seconds``, and print how many were refused and taken."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "here"  # so that ".." is in the temporary folder, too
        folder.mkdir()
        os.chdir(folder)
        if kind in ("config", "arguments"):
            (folder / "config.json").write_text(json.dumps(GPT2))
            command("estimate", folder / "config.json")  # loads libraries
        limit_memory(MEMORY)
        warnings.simplefilter("ignore")
        found = [0, 0]
        for number in numbers(count, seconds):
            choose = random.Random(f"{kind} {seed} {number}")
            torch.manual_seed(number)
            print(f"{kind}, seed {seed}, input {number}", file=sys.stderr, flush=True)
            with limited_time(SECONDS):
                taken = KINDS[kind](choose, folder)
            found[taken] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    fuzz(sys.argv[1], *map(int, sys.argv[2:]))
