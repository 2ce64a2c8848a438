"""How far the planner's estimate of activations is from what autograd really keeps.

    python -m benchmarks.planner            # everything, about two minutes
    python -m benchmarks.planner --quick    # small models only, seconds
    python -m benchmarks.planner --attention-dropout    # what GPT-2 keeps with it

Runs forward and backward of transformers' models on the CPU and counts bytes in two ways:

* *kept*: storages that autograd packs for the backward, each once, without parameters;
* *peak*: the highest sum of all tensors that are alive at once, beyond parameters and inputs.
  Gradients are among them. Every storage that an operator returns is followed until it is freed.

Both are counts of tensors and repeat exactly; allocators and kernels' workspaces are left out.
The large models run with fake tensors: real shapes, dtypes and lifetimes, but no memory. SANA is
among the cases where diffusers is installed. One row per case is appended to
``benchmarks/results/planner.csv``.

With dropout of attention, which GPT-2 has by default, PyTorch keeps the scores on a CPU, which no
estimate for a GPU counts; all cases but those of ``--attention-dropout`` are without it. The
latter are only printed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import append
from came8bit.planner import OPTIMIZERS, Model, Setup, architecture_of, estimate, from_architecture
from came8bit.planner.named import CONFIGS
from came8bit.planner.sana import Sana

RESULTS = Path(__file__).parent / "results" / "planner.csv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """One model in one setting."""

    name: str
    config: dict[str, Any]
    dtype: str
    batch: int
    sequence: int
    checkpointing: bool = False
    release: bool = False
    fake: bool = False


class Counts(NamedTuple):
    """Bytes."""

    kept: int
    peak: int


# --- counting -------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Follows every storage that operators return; ``peak`` is the most that was alive at once."""

    def __init__(self, ignore: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in ignore}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def kept_bytes(forward: Callable[[], Tensor], ignore: list[Tensor]) -> int:
    """Bytes that autograd keeps of ``forward``, each storage once, without those of ``ignore``."""
    ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    size = sum(storage.nbytes() for storage in seen.values())
    del loss
    return size


@contextlib.contextmanager
def releasing(model: torch.nn.Module) -> Iterator[None]:
    """Free every gradient as soon as it is there, as a step in backward does."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- running --------------------------------------------------------------------------------------


def build_sana(case: Case) -> torch.nn.Module:
    """Return the model of ``case``, made by diffusers."""
    from diffusers import SanaTransformer2DModel

    settings = {key: value for key, value in case.config.items() if key != "_class_name"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[case.dtype])  # fake parameters cannot be converted
    try:
        model = SanaTransformer2DModel(**settings, sample_size=round(case.sequence**0.5)).train()
    finally:
        torch.set_default_dtype(before)
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build(case: Case) -> torch.nn.Module:
    """Return the model of ``case``, made by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in case.config.items() if key != "model_type"}
    settings |= {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(case.config["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype]).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Shapes without memory.

    transformers looks at the values of positions to find packed sequences, and where it cannot, it
    prepares for them with a mask. Real positions of unpacked sequences give ``None`` there.
    """
    from transformers import masking_utils

    with (
        FakeTensorMode(),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        yield


def measure(case: Case) -> Counts:
    """Run forward and backward and count."""
    with fake_tensors() if case.fake else contextlib.nullcontext():
        sana = "_class_name" in case.config
        model = build_sana(case) if sana else build(case)
        inputs = _image(case) if sana else _text(case)
        ignore = [*model.parameters(), *model.buffers(), *inputs.values()]

        def forward() -> Tensor:
            result = model(**inputs)
            loss: Tensor = result.sample.pow(2).mean() if sana else result.loss
            return loss

        # Tables that are made once must not be counted.
        forward()
        kept = kept_bytes(forward, ignore)
        with releasing(model) if case.release else contextlib.nullcontext(), Alive(ignore) as alive:
            forward().backward()
    return Counts(kept, alive.peak)


def _text(case: Case) -> dict[str, Tensor]:
    tokens = torch.ones(case.batch, case.sequence, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}


def _image(case: Case) -> dict[str, Tensor]:
    """Return a square latent image, a caption and a time for each of the batch."""
    architecture, dtype = architecture_of(case.config), DTYPES[case.dtype]
    assert isinstance(architecture, Sana)
    side = round(case.sequence**0.5)
    caption = (case.batch, architecture.caption_tokens, architecture.caption_channels)
    return {
        "hidden_states": torch.ones(case.batch, architecture.in_channels, side, side, dtype=dtype),
        "encoder_hidden_states": torch.ones(caption, dtype=dtype),
        "timestep": torch.ones(case.batch, dtype=dtype),
    }


def planned(case: Case) -> Counts:
    """Return what the planner says of the same."""
    architecture = architecture_of(case.config)
    model = from_architecture(case.name, "", architecture)
    setup = Setup(
        dtype=case.dtype,
        batch=case.batch,
        sequence=case.sequence,
        checkpointing=case.checkpointing,
        release=case.release,
    )
    result = estimate(model, OPTIMIZERS["adamw-fused"], setup)
    backward = [moment for moment in result.moments if moment.name != "step"]
    return Counts(_kept(model, setup), max(moment.nbytes for moment in backward))


def _kept(model: Model, setup: Setup) -> int:
    """Bytes that stay until the backward begins: of them, 4 per logit are the softmax's."""
    architecture = model.architecture
    assert architecture is not None
    tokens = setup.batch * setup.sequence
    stages = architecture.stages(setup.batch, setup.sequence, setup.itemsize)
    kept = sum(s.kept for s in stages if s.layer is None or not setup.checkpointing)
    if setup.checkpointing:
        kept += architecture.layers * tokens * setup.itemsize * architecture.hidden
    return kept + 4 * tokens * architecture.logits


# --- cases ----------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
}
_SMALL_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "vocab_size": 2000,
    "n_positions": 512,
    "attn_pdrop": 0.0,  # with it PyTorch keeps the scores on a CPU
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}


def small_cases() -> Iterator[Case]:
    """Small models, real tensors."""
    kinds = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
    kinds += ["phi3", "olmo2", "granite", "smollm3", "gpt_neox"]
    configs = {kind: {**_SMALL, "model_type": kind} for kind in kinds}
    configs["gpt2"] = {**_SMALL_GPT2, **_NO_DROPOUT}
    for kind, config in configs.items():
        for dtype in DTYPES:
            yield Case(f"small {kind}", config, dtype, 2, 128)
    for kind in ("llama", "gpt2", "qwen2"):
        for dtype in DTYPES:
            for checkpointing in (False, True):
                for batch, sequence in ((1, 64), (1, 512), (4, 256)):
                    for release in (False, True):
                        yield Case(
                            f"small {kind}",
                            configs[kind],
                            dtype,
                            batch,
                            sequence,
                            checkpointing,
                            release,
                        )
    tied = {**configs["llama"], "tie_word_embeddings": True}
    wide = {**configs["llama"], "vocab_size": 32_000}
    dropout = {**_SMALL_GPT2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    extra = {"llama, tied": tied, "llama, 32,000 words": wide, "gpt2, dropout": dropout}
    for kind, config in extra.items():
        for release in (False, True):
            yield Case(f"small {kind}", config, "bf16", 2, 128, False, release)
            yield Case(f"small {kind}", config, "bf16", 2, 128, True, release)


def large_cases() -> Iterator[Case]:
    """Models by name, fake tensors."""
    settings = [("gpt2", 8, 1024), ("llama-1b", 2, 2048), ("qwen2.5-0.5b", 4, 1024)]
    settings += [("llama-7b", 1, 2048), ("llama-8b", 1, 1024), ("gemma-2b", 1, 2048)]
    for name, batch, sequence in settings:
        config = dict(CONFIGS[name][1])
        if name == "gpt2":
            config |= {**_NO_DROPOUT, "attn_pdrop": 0.0}
        for checkpointing in (False, True):
            for release in (False, True):
                yield Case(name, config, "bf16", batch, sequence, checkpointing, release, True)


def attention_dropout_cases() -> Iterator[Case]:
    """GPT-2 with all its default dropouts: what the planner does not count on a CPU."""
    for sequence in (128, 256, 512):
        config = {**_SMALL_GPT2, "attn_pdrop": 0.1}
        yield Case("small gpt2", config, "bf16", 2, sequence)
    for sequence in (128, 256, 512, 1024):
        yield Case("gpt2", dict(CONFIGS["gpt2"][1]), "bf16", 1, sequence, fake=True)


def sana_cases() -> Iterator[Case]:
    """SANA's transformer, small with real tensors and SANA-1.6B with fake ones."""
    config = CONFIGS["sana-1.6b"][1]
    small = {
        **config,
        "caption_channels": 96,
        "cross_attention_dim": 192,
        "cross_attention_head_dim": 48,
        "num_attention_heads": 6,
        "num_cross_attention_heads": 4,
        "num_layers": 4,
    }
    for checkpointing in (False, True):
        for release in (False, True):
            for dtype in DTYPES:
                yield Case("small sana", small, dtype, 2, 256, checkpointing, release)
            yield Case("sana-1.6b", config, "bf16", 2, 1024, checkpointing, release, True)


# --- results --------------------------------------------------------------------------------------


def about() -> dict[str, str]:
    """Return what a result depends on."""
    import transformers

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "git": git or "unknown",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def row(case: Case) -> dict[str, Any]:
    """Measure one case; errors are planned against measured, in per cent."""
    measured, said = measure(case), planned(case)
    return {
        "model": case.name,
        "dtype": case.dtype,
        "batch": case.batch,
        "sequence": case.sequence,
        "checkpointing": int(case.checkpointing),
        "release": int(case.release),
        "fake": int(case.fake),
        "kept_measured": measured.kept,
        "kept_estimated": said.kept,
        "kept_error_percent": round(100 * (said.kept / measured.kept - 1), 2),
        "peak_measured": measured.peak,
        "peak_estimated": said.peak,
        "peak_error_percent": round(100 * (said.peak / measured.peak - 1), 2),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the table of ``docs/planner.md``: smallest and largest errors."""
    lines = ["| | cases | kept | peak |", "|---|---:|---:|---:|"]
    for fake, size in ((0, "small"), (1, "large")):
        for checkpointing, how in ((0, ""), (1, ", checkpointing")):
            chosen = [
                found
                for found in rows
                if int(found["fake"]) == fake and int(found["checkpointing"]) == checkpointing
            ]
            if not chosen:
                continue
            cells = []
            for what in ("kept", "peak"):
                errors = [float(found[f"{what}_error_percent"]) for found in chosen]
                cells.append(f"{min(errors):+.1f} to {max(errors):+.1f} %")
            lines.append(f"| {size} models{how} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models only")
    parser.add_argument(
        "--attention-dropout", action="store_true", help="GPT-2 with it, and nothing else"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    cases = [*small_cases(), *([] if args.quick else large_cases())]
    if args.attention_dropout:
        cases = list(attention_dropout_cases())
    elif importlib.util.find_spec("diffusers") is None:
        print("left out: SANA, for diffusers is not installed")
    else:
        cases += [case for case in sana_cases() if not (args.quick and case.fake)]
    rows = []
    for case in cases:
        rows.append(row(case))
        r = rows[-1]
        print(
            f"{case.name:22s} {case.dtype} {case.batch} x {case.sequence:<5d}"
            f"{'checkpointing ' if case.checkpointing else '':14s}"
            f"{'release ' if case.release else '':8s}"
            f"kept {r['kept_measured'] / 1e6:9.2f} MB {r['kept_error_percent']:+6.2f} %   "
            f"peak {r['peak_measured'] / 1e6:9.2f} MB {r['peak_error_percent']:+6.2f} %"
        )
        sys.stdout.flush()
    if args.attention_dropout:
        return 0
    facts = about()
    append([{**facts, **row} for row in rows], args.out)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
