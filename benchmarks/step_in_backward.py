"""Peak memory and time of a training step, with and without stepping in backward, on a CPU.

    python -m benchmarks.step_in_backward            all cases; appends to
                                                           benchmarks/results/step_in_backward.csv
    python -m benchmarks.step_in_backward --quick    a small GPT, quickly; writes nothing
    python -m benchmarks.step_in_backward --models llama --dtypes bfloat16 --repeats 9

A step is zero_grad, forward, backward, step, of CAME8bit on random tokens. For the time the two
ways take turns in one process, each with a model of its own, and a ratio is formed per repetition.
For the memory each way gets a process of its own: the peak of the resident memory during the third
step above the level before it, which is gradients, activations and workspace (Linux only). It is
measured twice: as the C library manages memory by default, and with MALLOC_MMAP_THRESHOLD_=65536,
which makes glibc give back each freed block; see docs/step_in_backward.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import came8bit
from benchmarks.cpu_step import DTYPES, SEED, about, seconds
from benchmarks.harness import append, quantiles, ratios, some_of, state_bytes, turns
from benchmarks.process_memory import MAPPED, in_a_process
from came8bit import environment

RESULTS = Path(__file__).parent / "results" / "step_in_backward.csv"
MODES = ("ordinary", "in backward")
WARM_UP = 2


def _gpt(width: int, layers: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=8192,
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        # No dropout: both models have to see the same numbers.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def _llama(width: int, layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=128,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt-tiny": lambda: _gpt(256, 4),
    "gpt": lambda: _gpt(512, 8),
    "llama": lambda: _llama(768, 8),
}
"""Names of the cases; llama runs with activation checkpointing."""


@dataclass
class Training:
    """A model with its optimizer, and the way it steps."""

    model: torch.nn.Module
    optimizer: came8bit.CAME8bit
    batch: torch.Tensor

    @classmethod
    def make(cls, name: str, dtype: str, mode: str, tokens: int) -> Training:
        """Model, optimizer and batch; the same for every mode."""
        torch.manual_seed(SEED)
        model = MODELS[name]().to(DTYPES[dtype]).train()
        optimizer = came8bit.CAME8bit(model.parameters(), lr=1e-5)
        if mode == "in backward":
            came8bit.step_in_backward(optimizer)
        batch = torch.randint(0, 8192, (1, tokens), generator=torch.Generator().manual_seed(SEED))
        return cls(model, optimizer, batch)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()


@dataclass
class Row:
    """One way of stepping one model, one line of the CSV. Times in ms, memory in bytes."""

    model: str
    dtype: str
    mode: str
    tokens: int
    numel: int
    grad_bytes: int
    state_bytes_per_param: float
    times: list[float]
    ratios: list[float]
    ratio_min: float
    peak_bytes: int | None = None
    peak_bytes_mapped: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Columns of the CSV."""
        ms = {f"{name}_ms": f"{1e3 * t:.4f}" for name, t in quantiles(self.times).items()}
        ratios = {f"ratio_{name}": f"{r:.4f}" for name, r in quantiles(self.ratios).items()}
        return {
            **self.about,
            "model": self.model,
            "dtype": self.dtype,
            "mode": self.mode,
            "tokens": self.tokens,
            "numel": self.numel,
            "grad_bytes": self.grad_bytes,
            "repeats": len(self.times),
            **ms,
            "min_ms": f"{1e3 * min(self.times):.4f}",
            "relative_to": MODES[0],
            **ratios,
            "ratio_min": f"{self.ratio_min:.4f}",
            "peak_bytes": "" if self.peak_bytes is None else self.peak_bytes,
            "peak_bytes_mapped": "" if self.peak_bytes_mapped is None else self.peak_bytes_mapped,
            "state_bytes_per_param": f"{self.state_bytes_per_param:.5f}",
        }


def run_round(name: str, dtype: str, tokens: int, repeats: int) -> list[Row]:
    """Let the two ways take turns; times and ratios are relative to the first."""
    made = {mode: Training.make(name, dtype, mode, tokens) for mode in MODES}
    for training in made.values():
        for _ in range(WARM_UP):
            training.step()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in turns(MODES, 0.0, fewest=repeats):
        for mode in turn:
            times[mode].append(seconds(made[mode].step))
    params = [list(training.model.parameters()) for training in made.values()]
    if not all(torch.equal(p, q) for p, q in zip(*params, strict=True)):
        raise RuntimeError(f"{name} {dtype}: the two ways have not given the same parameters")
    base = times[MODES[0]]
    return [
        Row(
            name,
            dtype,
            mode,
            tokens,
            sum(p.numel() for p in params[0]),
            sum(p.nbytes for p in params[0]),
            state_bytes(made[mode].optimizer) / sum(p.numel() for p in params[0]),
            own,
            ratios(own, base),
            min(own) / min(base),
        )
        for mode, own in times.items()
    ]


# --- memory ---------------------------------------------------------------------------------------


def peak(row: Row, environment: dict[str, str], threads: int) -> int | None:
    """How much the third step raises the resident memory; None where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    code = """
        import torch
        from benchmarks.step_in_backward import WARM_UP, Training
        *arguments, threads = question
        torch.set_num_threads(threads)
        training = Training.make(*arguments)
        for _ in range(WARM_UP):
            training.step()
        training.optimizer.zero_grad()
        answer = peak_of(training.step)
    """
    question = [row.model, row.dtype, row.mode, row.tokens, threads]
    found: int = in_a_process(code, question, **environment)
    return found


# --- command line ---------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    lines = [
        "| model | dtype | step | ms p20 / p50 / p80 | ratio p50 (p20–p80) | gradients MB "
        "| peak of a step MB | with mapped blocks MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = " / ".join(f"{1e3 * t:.1f}" for t in quantiles(row.times).values())
        ratio = quantiles(row.ratios)
        peaks = [
            "" if value is None else f"{value / 1e6:.1f}"
            for value in (row.peak_bytes, row.peak_bytes_mapped)
        ]
        lines.append(
            f"| {row.model} | {row.dtype} | {row.mode} | {ms} "
            f"| {ratio['p50']:.3f} ({ratio['p20']:.3f}–{ratio['p80']:.3f}) "
            f"| {row.grad_bytes / 1e6:.1f} | {peaks[0]} | {peaks[1]} |"
        )
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, known in (("--models", MODELS), ("--dtypes", DTYPES)):
        parser.add_argument(name, type=some_of(known), help=f"of {', '.join(known)}")
    parser.add_argument("--repeats", type=int, help="timed steps of each way (default: 7)")
    parser.add_argument("--tokens", type=int, default=128, help="of the batch, up to 128")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="gpt-tiny only, no CSV")
    parser.add_argument("--csv", type=Path, help=f"append here (default: {RESULTS.name})")
    options = parser.parse_args(arguments)
    options.models = options.models or (["gpt-tiny"] if options.quick else ["gpt", "llama"])
    options.dtypes = options.dtypes or list(DTYPES)
    options.repeats = options.repeats or 7
    if options.csv is None and not options.quick:
        options.csv = RESULTS
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not came8bit.kernel_status().cpu.loaded:
        raise SystemExit(f"the kernels are not loaded: {came8bit.kernel_status().cpu.reason}")
    common = about()
    common["transformers"] = environment.versions()["transformers"]
    print(", ".join(f"{name} {value}" for name, value in common.items() if value != ""))
    everything: list[Row] = []
    for model in options.models:
        for dtype in options.dtypes:
            print(f"{model} {dtype} ...", file=sys.stderr, flush=True)
            rows = run_round(model, dtype, options.tokens, options.repeats)
            for row in rows:
                row.about = common
                row.peak_bytes = peak(row, {}, torch.get_num_threads())
                row.peak_bytes_mapped = peak(row, MAPPED, torch.get_num_threads())
            everything += rows
            if options.csv:
                append([row.flat() for row in rows], options.csv)
            medians = [statistics.median(row.times) for row in rows]
            print(f"  {medians[1] / medians[0]:.3f} of the time", file=sys.stderr, flush=True)
    print("\n".join(["", *table(everything)]))


if __name__ == "__main__":
    main()
