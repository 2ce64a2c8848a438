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
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import append
from benchmarks.memory_cap.gpu import Plan, resumes
from benchmarks.memory_cap.job import Job
from benchmarks.memory_cap.launch import Worker
from benchmarks.memory_cap.model import SHAPES
from benchmarks.memory_cap.optimizers import Choice
from benchmarks.memory_cap.proof import Proof, failing, fitting, prove, run_limited
from benchmarks.memory_cap.rows import about, line, name_of, row, target

RESULTS = Path(__file__).resolve().parents[1] / "results"


def on_cpu(worker: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Run the proof under a limit, then without one what others need and what paging costs."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            options.shape,
            (),
            batch=options.batch,
            sequence=options.sequence,
            steps=options.steps,
            warm_up=1,
            folder=folder,
            save_after=options.steps // 2,
        )
        proof = prove(worker, job)
    job = replace(proof.job, folder=None, save_after=None)
    (fits,) = job.choices
    others = failing(fits)
    print(f"limit: {proof.allowed}", flush=True)
    cap = ("address space", proof.allowed.total)
    rows = [
        row("free", job, others[0], proof.free),
        row("cap", job, fits, proof.fits, cap),
        row("resumed", job, fits, proof.resumed, cap),
        *(
            row("counter", job, other, result, cap)
            for other, result in zip(others, proof.failed, strict=True)
        ),
    ]
    not_run = []
    for choice in (fits, others[1], *theirs()):
        if choice.name == "PagedAdamW8bit" and not installed(choice):
            not_run.append({"what": name_of(choice), "why": "bitsandbytes is not installed"})
            continue
        for part, limit in (("free", None), ("counter", proof.allowed.total)):
            if part == "counter" and choice in (fits, others[1]):
                continue
            one = replace(job, choices=(choice,))
            result = run_limited(worker, one, limit) if limit else worker.run(one)
            rows.append(row(part, job, choice, result, cap if limit else ("", None)))
    rows += compare(worker, job, (others[1], replace(fits, page_budget=1 << 40), fits))
    return {
        "rows": rows,
        "targets": judge(proof),
        "not_run": not_run,
        "limit": vars(proof.allowed),
        "text": worker.text,
        "failures": 0,
    }


def within(worker: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Run what has to fit, alone, in a process of ``options.limit`` bytes."""
    choice = fitting(options.shape)
    job = Job(
        options.shape,
        (choice,),
        batch=options.batch,
        sequence=options.sequence,
        steps=options.steps,
        warm_up=1,
    )
    result = worker.run(job, limit=options.limit, seconds=3600)
    what = f"{options.shape}: {name_of(choice)} fits in {options.limit / 1e9:g} GB"
    got = result.get("message", f"{result.get('peak_address_space', 0) / 1e9:.2f} GB and Python")
    targets = [target(what, result["outcome"] == "ok", got)]
    if result["outcome"] == "ok":
        fell = result["loss_after"] < result["loss_before"]
        got = f"{result['loss_before']:.3f} -> {result['loss_after']:.3f} on text not trained on"
        targets.append(target(f"{options.shape}: the loss falls", fell, got))
    return {
        "rows": [row("cap", job, choice, result, ("whole process", options.limit))],
        "targets": targets,
        "not_run": [],
        "text": worker.text,
        "failures": 0,
    }


def theirs() -> tuple[Choice, ...]:
    """Other optimizers; on a CPU bitsandbytes' paged one does not page."""
    return tuple(
        Choice(name, released) for name in ("PagedAdamW8bit", "AdamW") for released in (False, True)
    )


def installed(choice: Choice) -> bool:
    """Whether the module it needs is there."""
    return choice.name != "PagedAdamW8bit" or importlib.util.find_spec("bitsandbytes") is not None


def compare(worker: Worker, job: Job, choices: tuple[Choice, ...]) -> list[dict[str, Any]]:
    """In turns: resident, paged with room for everything, paged. Ratios are of medians of turns."""
    job = replace(job, choices=choices, turns=5, steps=3, warm_up=1)
    result = worker.run(job)
    rows = []
    for choice, times, turns, pages in zip(
        choices, result["times"], result["turns"], result["paging"], strict=True
    ):
        ratios = [a / b for a, b in zip(turns, result["turns"][0], strict=True)]
        shown = {**result, **pages}
        rows.append(row("compare", job, choice, shown, times=times, ratios=ratios))
    return rows


def judge(proof: Proof) -> list[dict[str, Any]]:
    """Return what the proof has to show."""
    shape, fits, free = proof.job.shape, proof.fits, proof.free
    (choice,) = proof.job.choices
    ok = fits["outcome"] == "ok"
    got = fits.get("message") or (
        f"{fits['peak_address_space'] / 1e6:.1f} MB of {proof.allowed.total / 1e6:.1f}; without a "
        f"limit {name_of(failing(choice)[0])} takes {free['peak_address_space'] / 1e6:.1f}"
    )
    found = [target(f"{shape}: {name_of(choice)} fits", ok, got)]
    for other, result in zip(failing(choice), proof.failed, strict=True):
        ran_out = result["outcome"] == "out of memory"
        what = f"{shape}: {name_of(other)} does not fit"
        found.append(target(what, ran_out, result.get("message", "it fits")))
    if ok:
        same = fits["losses"] == free["losses"] and fits["digest"] == free["digest"]
        got = f"{len(fits['losses'])} losses, the last {fits['losses'][-1]:.6f}"
        what = f"{shape}: losses and parameters are those of the unlimited run, to the bit"
        found.append(target(what, same, got))
        fell = fits["loss_after"] < fits["loss_before"]
        got = f"{fits['loss_before']:.3f} -> {fits['loss_after']:.3f} on text not trained on"
        found.append(target(f"{shape}: the loss falls", fell, got))
        found.append(resumes(shape, fits, proof.resumed))
    return found


def on_gpu(worker: Worker | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return the plan of the GPU, or with a worker for CPUs its rehearsal."""

    def start() -> Worker:
        return worker or Worker("cuda", options.corpus, options.data_dir)

    plan = Plan("cpu" if worker else "cuda", start, options.seconds, options.steps)
    plan.run()
    return {
        "rows": plan.rows,
        "targets": plan.targets,
        "not_run": plan.not_run,
        "copy": plan.copy,
        "text": plan.text,
        "failures": plan.failures,
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows in a file written by ``--out``, or in a report with a part ``capped``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = content.get("capped", content)["rows"]
    return rows


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
    parser.add_argument(
        "--append", type=Path, help="a memory_cap.json or gpu.json: only add its rows"
    )
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
        append(rows_of(options.append), RESULTS / "memory_cap.csv")
        return 0
    begin = time.monotonic()
    if options.device == "cuda":
        result = on_gpu(None, options)
    else:
        with Worker("cpu", options.corpus, options.data_dir) as worker:
            if options.rehearse:
                result = on_gpu(worker, options)
            else:
                result = within(worker, options) if options.limit else on_cpu(worker, options)
    common = about(options.device, result["text"])
    print(json.dumps(common))
    if options.device == "cpu" and not options.rehearse:
        print("\n".join(map(line, result["rows"])))
    result["rows"] = [{**common, **one} for one in result["rows"]]
    result |= {"rehearsal": options.rehearse, "seconds": round(time.monotonic() - begin, 1)}
    for one in result["targets"]:
        print(one["text"])
    for one in result["not_run"]:
        print(f"not run: {one['what']}: {one['why'].splitlines()[0]}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        (options.out / "memory_cap.json").write_text(text, encoding="utf-8")
    if options.out or not options.rehearse:
        append(result["rows"], (options.out or RESULTS) / "memory_cap.csv")
    proven = all(one["holds"] for one in result["targets"])
    # On a CPU everything is decided; on a GPU a target that is missed is a figure like others.
    return int(result["failures"] > 0 or (options.device == "cpu" and not proven))


if __name__ == "__main__":
    sys.exit(main())
