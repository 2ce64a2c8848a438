"""Whether the planner's trace of activations is what real tensors take, and what a trace costs.

    python -m benchmarks.planner            # everything, some minutes
    python -m benchmarks.planner --quick    # small models only
    python -m benchmarks.planner --attention-dropout    # what GPT-2 keeps with it on a CPU

Small models run forward and backward with real tensors on the CPU, large ones with fake tensors
only. *Counted* is the highest sum of all tensors alive at once, beyond parameters and inputs; every
storage that an operator returns is followed until it is freed. *Traced* is what the planner says.
Allocators' rounding and kernels' workspaces are left out; a difference of up to that rounding comes
from temporaries that Python frees a moment earlier or later. One row per case is
appended to ``benchmarks/results/planner.csv``.

With dropout of attention, which GPT-2 has by default, PyTorch keeps the scores on a CPU, which the
planner does not count: kernels for GPUs draw it inside. ``--attention-dropout`` only prints.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import append
from came8bit import planner
from came8bit.planner import activations, workloads

RESULTS = Path(__file__).parent / "results" / "planner.csv"


ROUNDING = 512  # bytes to which CUDA's allocator rounds


class Case(NamedTuple):
    """One model in one setting; real: whether tensors with memory are counted as well."""

    name: str
    config: dict[str, Any]
    dtype: str
    batch: int
    sequence: int
    checkpointing: bool = False
    release: bool = False
    real: bool = True


def counted(case: Case) -> int:
    """Run forward and backward with real tensors and return the peak in bytes."""
    work = planner.from_config(case.config, case.name, "").workload
    assert work is not None
    dtype = activations.DTYPES[case.dtype]
    with activations.dropout_of_gpus():
        model = work.build(dtype, case.checkpointing, None).train()
        inputs = work.inputs(model, case.batch, case.sequence, dtype)
        ignore = [*model.parameters(), *model.buffers(), *inputs.values()]
        work.loss(model, inputs)  # tables that are made once are not counted
        releases = releasing(model) if case.release else contextlib.nullcontext()
        with releases, planner.StorageCounter(ignore) as counter:
            work.loss(model, inputs).backward()
    return counter.peak


@contextlib.contextmanager
def releasing(model: torch.nn.Module) -> Iterator[None]:
    """Free every gradient as soon as it is complete, as a step in backward does."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def traced(case: Case) -> int:
    """Return what the planner says of the same: bytes of forward and backward at their peak."""
    model = planner.from_config(case.config, case.name, "")
    setup = planner.Setup(
        dtype=case.dtype,
        batch=case.batch,
        sequence=case.sequence,
        checkpointing=case.checkpointing,
        release=case.release,
    )
    # Fused AdamW has no temporaries.
    moments = planner.estimate(model, planner.OPTIMIZERS["adamw-fused"], setup).moments
    return max(moment.nbytes for moment in moments if moment.name != "step")


# --- cases ----------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
}
SMALL_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "vocab_size": 2000,
    "n_positions": 512,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
SMALL_SANA = {
    **planner.CONFIGS["sana-1.6b"][1],
    "caption_channels": 96,
    "cross_attention_dim": 192,
    "cross_attention_head_dim": 48,
    "num_attention_heads": 6,
    "num_cross_attention_heads": 4,
    "num_layers": 4,
}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
KINDS += ("phi3", "olmo2", "granite", "smollm3", "gpt_neox")


def small_cases() -> Iterator[Case]:
    """Yield small models, with real tensors."""
    configs: dict[str, dict[str, Any]] = {kind: {**SMALL, "model_type": kind} for kind in KINDS}
    configs["gpt2"] = {**SMALL_GPT2, **NO_DROPOUT}
    for kind, config in configs.items():
        for dtype in ("fp32", "bf16"):
            yield Case(f"small {kind}", config, dtype, 2, 128)
    both = (False, True)
    for kind in ("llama", "gpt2", "qwen2"):
        for dtype in ("fp32", "bf16"):
            for checkpointing in both:
                for batch, sequence in ((1, 64), (1, 512), (4, 256)):
                    for release in both:
                        setting = (dtype, batch, sequence, checkpointing, release)
                        yield Case(f"small {kind}", configs[kind], *setting)
    extra = {
        "llama, tied": {**configs["llama"], "tie_word_embeddings": True},
        "llama, 32,000 words": {**configs["llama"], "vocab_size": 32_000},
        "gpt2, dropout": SMALL_GPT2,
        "sana": SMALL_SANA,
    }
    for kind, config in extra.items():
        for dtype in ("fp32", "bf16") if kind == "sana" else ("bf16",):
            for release in both:
                for checkpointing in both:
                    setting = (dtype, 2, 256 if kind == "sana" else 128, checkpointing, release)
                    yield Case(f"small {kind}", config, *setting)


def large_cases() -> Iterator[Case]:
    """Yield models by name, fake tensors only."""
    settings = [("gpt2", 8, 1024), ("llama-1b", 2, 2048), ("qwen2.5-0.5b", 4, 1024)]
    settings += [("llama-7b", 1, 2048), ("llama-8b", 1, 1024), ("gemma-2b", 1, 2048)]
    settings += [("sana-1.6b", 2, 1024)]
    for name, batch, sequence in settings:
        for checkpointing in (False, True):
            for release in (False, True):
                config = planner.CONFIGS[name][1]
                setting = ("bf16", batch, sequence, checkpointing, release)
                yield Case(name, config, *setting, real=False)


def row(case: Case) -> dict[str, Any]:
    """Trace one case and, with a real one, count it."""
    start = time.perf_counter()
    said = traced(case)
    seconds = time.perf_counter() - start
    found = counted(case) if case.real else ""
    return {
        "model": case.name,
        "dtype": case.dtype,
        "batch": case.batch,
        "sequence": case.sequence,
        "checkpointing": int(case.checkpointing),
        "release": int(case.release),
        "traced": said,
        "counted": found,
        "difference": "" if found == "" else said - found,
        "trace_seconds": f"{seconds:.2f}",
    }


def attention_dropout() -> None:
    """Print what GPT-2 takes with all its dropouts, on a CPU and by the planner."""
    for sequence in (128, 256, 512):
        case = Case("small gpt2", SMALL_GPT2, "bf16", 2, sequence)
        with mock.patch.object(workloads, "_ATTENTION_DROPOUT", ()):  # none is left out
            on_cpu = counted(case)
        print(f"{case.name} 2 x {sequence}: {on_cpu / traced(case):.2f} times what is traced")


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


def main() -> int:
    """Run, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models only")
    parser.add_argument(
        "--attention-dropout", action="store_true", help="GPT-2 with it, and nothing else"
    )
    parser.add_argument("--models", default="", help="only those with this in their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.attention_dropout:
        attention_dropout()
        return 0
    facts, rows = about(), []
    cases = [*small_cases(), *([] if args.quick else large_cases())]
    for case in (case for case in cases if args.models in case.name):
        rows.append(row(case))
        print(*rows[-1].values(), sep="\t", flush=True)
    append([{**facts, **row} for row in rows], args.out)
    differences = [row["difference"] for row in rows if row["difference"] != ""]
    far = [difference for difference in differences if abs(difference) > ROUNDING]
    same = sum(difference == 0 for difference in differences)
    print(f"{same} of {len(differences)} cases are equal to the byte, {len(far)} differ by more")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
