"""A 7B-shaped Llama, random weights, real text, a hard cap on memory.

    python -m benchmarks.memory_cap                      on a GPU if there is one, else on the CPU
    python -m benchmarks.memory_cap --device cuda --seconds 180 --out FOLDER
    python -m benchmarks.memory_cap --device cpu --shape llama-8b/8 --steps 8
    python -m benchmarks.memory_cap --device cpu --shape llama-7b --limit 16e9 --steps 3
    python -m benchmarks.memory_cap --device cpu --rehearse     the GPU's pieces, tiny

bf16 parameters are made on the device, activations are checkpointed, and every byte of the text is
a token. Each run is a process of its own.

On a GPU the cap is for the whole GPU: 16 GB for Llama 7B, 24 GB for Llama 8B, the driver's context
included. PyTorch's share of it is enforced. CUDA managed memory, where bitsandbytes keeps paged
state, obeys no such cap; it is counted, and never taken where it could exceed the GPU. Further
pieces compare paged with resident state without a cap, and resume from a checkpoint.

On a CPU the cap is a limit of the address space (RLIMIT_AS) that another process sets. It is what
the model needs by itself, measured, plus the pages that pass, the state that stays and 4 MiB. Paged
state with steps in backward has to fit, and has to give the same bits as an unlimited run of the
dense optimizer; without either of the two it must not fit. --limit N is something else: what fits
runs alone, in N bytes for the whole process, so that large shapes can be tried. Needs Linux.

Appends to benchmarks/results/memory_cap.csv; --out FOLDER writes memory_cap.{csv,json} there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import append
from benchmarks.memory_cap.gpu import Plan
from benchmarks.memory_cap.job import Job
from benchmarks.memory_cap.launch import Worker
from benchmarks.memory_cap.model import SHAPES
from benchmarks.memory_cap.optimizers import Choice
from benchmarks.memory_cap.proof import Proof, failing, fitting, prove, run_limited
from benchmarks.memory_cap.rows import Findings, about, losses, name_of, row

RESULTS = Path(__file__).resolve().parents[1] / "results"


def job_of(options: argparse.Namespace, *choices: Choice, **changes: Any) -> Job:
    """Return the job of the command line, on a CPU."""
    sizes = {name: getattr(options, name) for name in ("batch", "sequence", "steps")}
    return Job(options.shape, choices, warm_up=1, **sizes, **changes)


def on_cpu(worker: Worker, options: argparse.Namespace, found: Findings) -> None:
    """Prove what fits under a limit; then run others, and what paging costs, without one."""
    with tempfile.TemporaryDirectory() as folder:
        proof = prove(worker, job_of(options, folder=folder, save_after=options.steps // 2))
    job = replace(proof.job, folder=None, save_after=None)
    (fits,) = job.choices
    others = failing(fits)
    print(f"limit: {proof.allowed}", flush=True)
    found.extra["limit"] = vars(proof.allowed)
    cap = ("address space", proof.allowed.total)
    found.add(row("free", job, others[0], proof.free))
    found.add(row("cap", job, fits, proof.fits, cap))
    found.add(row("resumed", job, fits, proof.resumed, cap))
    for other, result in zip(others, proof.failed, strict=True):
        found.add(row("counter", job, other, result, cap))
    judge(proof, found)
    for choice in (fits, others[1]):
        found.add(row("free", job, choice, worker.run(replace(job, choices=(choice,)))))
    for name in ("PagedAdamW8bit", "AdamW"):  # on a CPU the first one does not page
        for released in (False, True):
            choice = Choice(name, released)
            if name == "PagedAdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
                found.skip(name_of(choice), "bitsandbytes is not installed")
                continue
            one = replace(job, choices=(choice,))
            found.add(row("free", job, choice, worker.run(one)))
            result = run_limited(worker, one, proof.allowed.total)
            found.add(row("counter", job, choice, result, cap))
    ways = (others[1], replace(fits, page_budget=1 << 40), fits)
    job = replace(job, choices=ways, turns=5, steps=3, warm_up=1)
    found.compared(job, worker.run(job))


def within(worker: Worker, options: argparse.Namespace, found: Findings) -> None:
    """Run what has to fit, alone, in a process of ``options.limit`` bytes."""
    choice = fitting(options.shape)
    job = job_of(options, choice)
    result = worker.run(job, limit=options.limit, seconds=3600)
    found.add(row("cap", job, choice, result, ("whole process", options.limit)))
    what = f"{options.shape}: {name_of(choice)} fits in {options.limit / 1e9:g} GB"
    got = result.get("message", f"{result.get('peak_address_space', 0) / 1e9:.2f} GB and Python")
    found.judge(what, result["outcome"] == "ok", got)
    if result["outcome"] == "ok":
        fell = result["loss_after"] < result["loss_before"]
        found.judge(f"{options.shape}: the loss falls", fell, losses(result))


def judge(proof: Proof, found: Findings) -> None:
    """Judge what the proof has to show."""
    shape, fits, free = proof.job.shape, proof.fits, proof.free
    (choice,) = proof.job.choices
    ok = fits["outcome"] == "ok"
    got = fits.get("message") or (
        f"{fits['peak_address_space'] / 1e6:.1f} MB of {proof.allowed.total / 1e6:.1f}; without a "
        f"limit {name_of(failing(choice)[0])} takes {free['peak_address_space'] / 1e6:.1f}"
    )
    found.judge(f"{shape}: {name_of(choice)} fits", ok, got)
    for other, result in zip(failing(choice), proof.failed, strict=True):
        ran_out = result["outcome"] == "out of memory"
        what = f"{shape}: {name_of(other)} does not fit"
        found.judge(what, ran_out, result.get("message", "it fits"))
    if ok:
        same = fits["losses"] == free["losses"] and fits["digest"] == free["digest"]
        what = f"{shape}: losses and parameters are those of the unlimited run, to the bit"
        found.judge(what, same, f"{len(fits['losses'])} losses, the last {fits['losses'][-1]:.6f}")
        fell = fits["loss_after"] < fits["loss_before"]
        found.judge(f"{shape}: the loss falls", fell, losses(fits))
        found.resumed(shape, fits, proof.resumed)


def on_gpu(worker: Worker | None, options: argparse.Namespace, found: Findings) -> None:
    """Run the plan of the GPU, or with a worker for CPUs its rehearsal."""

    def start() -> Worker:
        return worker or Worker("cuda", options.corpus, options.data_dir)

    Plan("cpu" if worker else "cuda", start, options.seconds, options.steps, found).run()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--shape", default="llama-7b/8", help=f"CPU; of {', '.join(SHAPES)}")
    parser.add_argument("--batch", type=int, default=1, help="CPU; sequences of a step")
    parser.add_argument("--sequence", type=int, default=64, help="CPU; tokens of each")
    parser.add_argument("--steps", type=int, help="default: 6; on a GPU 12 timed ones")
    parser.add_argument(
        "--limit", type=lambda n: int(float(n)), help="CPU; bytes of the whole process"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="GPU; for everything, about")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's pieces, tiny, on a CPU")
    parser.add_argument("--corpus", default="stdlib", help="of `came8bit tradeoff`")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of fetched corpora")
    parser.add_argument("--out", type=Path, help="folder for memory_cap.csv and memory_cap.json")
    parser.add_argument("--append", type=Path, help="a memory_cap.json: only add its rows")
    options = parser.parse_args(arguments)
    if options.device is None:
        gpu = torch.cuda.is_available() and not options.rehearse
        options.device = "cuda" if gpu else "cpu"
    if options.shape not in SHAPES:
        parser.error(f"--shape: got {options.shape}, expected one of {', '.join(SHAPES)}")
    if options.device == "cuda" and options.rehearse:
        parser.error("--rehearse is for --device cpu; on a GPU leave it out")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --rehearse tries the code without one")
    if not sys.platform.startswith("linux"):
        parser.error("this needs Linux: limits are set, and memory is read, in its ways")
    options.steps = options.steps or (12 if options.device == "cuda" else 6)
    if options.steps < 2:
        parser.error(f"--steps: got {options.steps}, expected at least 2")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a piece failed or a run is not the other's equal."""
    options = parse(arguments)
    if options.append:
        rows = json.loads(options.append.read_text(encoding="utf-8"))["rows"]
        append(rows, RESULTS / "memory_cap.csv")
        return 0
    found = Findings(options.device)
    if options.out:
        found.json = options.out / "memory_cap.json"
    if options.out or not options.rehearse:
        found.csv = (options.out or RESULTS) / "memory_cap.csv"
    found.extra["rehearsal"] = options.rehearse
    if options.device == "cuda":
        on_gpu(None, options, found)
    else:
        with Worker("cpu", options.corpus, options.data_dir) as worker:
            found.text = worker.text
            run = on_gpu if options.rehearse else within if options.limit else on_cpu
            run(worker, options, found)
    print(json.dumps(about(options.device, found.text)))
    proven = all(one["holds"] for one in found.targets)
    # On a CPU everything is decided; on a GPU a target that is missed is a figure like others.
    return int(found.failures > 0 or (options.device == "cpu" and not proven))


if __name__ == "__main__":
    sys.exit(main())
