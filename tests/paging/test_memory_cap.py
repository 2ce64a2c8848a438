"""The capped job on a CPU: a small Llama, real text, and a limit that another process sets.

It runs what ``make bench-memory-cap`` runs. The limit follows from measured and planned sizes
(``benchmarks/memory_cap/proof.py``), so none of the figures below is tuned.
"""

from __future__ import annotations

import json
import types
from typing import ClassVar

import pytest
import torch

from benchmarks import harness
from benchmarks.memory_cap import __main__ as bench
from benchmarks.memory_cap import gpu, launch, optimizers
from benchmarks.memory_cap import job as job_module
from benchmarks.memory_cap import memory as memory_module
from benchmarks.memory_cap import proof as proof_module
from benchmarks.memory_cap import rows as rows_module

SHAPE = "llama-7b/8"
STEPS = 4


@pytest.fixture(scope="module")
def worker():
    with launch.Worker("cpu") as made:
        yield made


@pytest.fixture(scope="module")
def proof(worker, tmp_path_factory):
    job = job_module.Job(
        SHAPE,
        (),
        sequence=32,
        steps=STEPS,
        save_after=2,
        folder=str(tmp_path_factory.mktemp("saved")),
    )
    return proof_module.prove(worker, job)


def test_paged_and_released_fits(proof, record_property):
    record_property("limit", str(proof.allowed))
    print(proof.allowed)
    assert proof.fits["outcome"] == "ok", proof.fits
    assert proof.fits["peak_address_space"] <= proof.allowed.total
    # It has paged: nearly all of the state moves, through less than a quarter of its bytes.
    assert proof.fits["moved"] > 0.95 * proof.fits["numel"]
    assert proof.fits["staging"] < proof.fits["moved"] / 4


@pytest.mark.parametrize("number", range(3))
def test_without_either_saving_it_does_not_fit(proof, number):
    choice = proof_module.failing(proof.job.choices[0])[number]
    result = proof.failed[number]
    assert result["outcome"] == "out of memory", (choice, result)


def test_what_fails_under_the_limit_fails_for_want_of_memory_alone(proof):
    """The first of them runs without the limit, and takes more than the limit by a margin."""
    assert proof.free["outcome"] == "ok"
    assert proof.free["peak_address_space"] > 1.3 * proof.allowed.total


def test_same_bits_as_the_unlimited_dense_run(proof):
    assert len(proof.free["losses"]) == STEPS
    assert proof.fits["losses"] == proof.free["losses"]
    assert proof.fits["loss_after"] == proof.free["loss_after"]
    assert proof.fits["digest"] == proof.free["digest"]


def test_the_loss_on_other_text_falls(proof):
    assert proof.fits["loss_after"] < proof.fits["loss_before"] - 0.2


def test_resumed_under_the_limit_to_the_same_bits(proof):
    assert proof.resumed["outcome"] == "ok", proof.resumed
    assert proof.resumed["losses"] == proof.fits["losses"][2:]
    assert proof.resumed["loss_after"] == proof.fits["loss_after"]
    assert proof.resumed["digest"] == proof.fits["digest"]
    # Model and optimizer are on the disk once.
    state = proof.fits["pages"] + proof.allowed.resident
    assert proof.fits["saved_bytes"] == pytest.approx(proof.fits["param_bytes"] + state, rel=0.02)


def test_the_benchmark_judges_what_it_sees(proof):
    found = rows_module.Findings("cpu")
    bench.judge(proof, found)
    wrong = {**proof.resumed, "losses": [loss + 1e-6 for loss in proof.resumed["losses"]]}
    found.resumed(SHAPE, proof.fits, wrong)
    assert [one["holds"] for one in found.targets] == [True] * 7 + [False]


def test_parameters_are_bf16_from_the_beginning(proof):
    """No fp32 copy, not even of a part: the model by itself is far from the size of one."""
    assert proof.free["param_bytes"] == 2 * proof.free["numel"]
    assert proof.allowed.model < 1.6 * proof.free["param_bytes"]


def test_bitsandbytes_takes_the_same_way(worker):
    choice = optimizers.Choice("PagedAdamW8bit", released=True)
    ordinary = optimizers.Choice("PagedAdamW8bit", released=False)
    results = [
        worker.run(job_module.Job("llama-7b/16", (c,), sequence=8, steps=2))
        for c in (choice, ordinary)
    ]
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["digest"] == results[1]["digest"]


@pytest.mark.parametrize(("without", "outcome"), [("ok", "out of memory"), ("died", "died")])
def test_a_death_is_for_want_of_memory_if_the_limit_is_to_blame(without, outcome):
    class Dying:
        def run(self, job, beyond=None):
            return {"outcome": "died" if beyond else without}

    assert proof_module.run_limited(Dying(), None, 1)["outcome"] == outcome


# The libraries alone, a CUDA build of torch among them, may map 5 GB.
@pytest.mark.parametrize(("limit", "holds"), [(16 << 30, [True, True]), (64 << 20, [False])])
def test_a_limit_of_the_whole_process(worker, limit, holds):
    options = ["--device", "cpu", "--shape", "llama-7b/16", "--steps", "6", "--limit", str(limit)]
    found = rows_module.Findings("cpu")
    bench.within(worker, bench.parse(options), found)
    assert [one["holds"] for one in found.targets] == holds, found.targets
    assert found.rows[0]["cap_bytes"] == limit


def test_a_job_that_fails_says_why(worker):
    job = job_module.Job("llama-7b/16", (optimizers.Choice("unknown", False),))
    with pytest.raises(launch.WorkerError, match="expected one of CAME8bit, PagedCAME8bit"):
        worker.run(job)


def test_rehearsal_of_the_gpu_part(worker):
    """Every kind of piece, tiny, on the CPU; without a cap only losses and resuming are judged."""
    plan = gpu.Plan("cpu", lambda: worker, seconds=600, steps=2)
    plan.fit("llama-8b", gpu.PAGED, 1024)
    plan.compare("llama-7b", 256)
    plan.resume("llama-7b/8", 256)
    plan.fail("llama-7b", gpu.RESIDENT)
    assert {row["part"] for row in plan.found.rows} == {
        "cap",
        "compare",
        "saved",
        "resumed",
        "counter",
    }
    assert all(row["outcome"] == "ok" for row in plan.found.rows)
    resumed = [one for one in plan.found.targets if "resumed" in one["what"]]
    assert [one["holds"] for one in resumed] == [True]


class Scripted:
    """In place of a process on a GPU: says what such a one could say."""

    text: ClassVar = {}

    def __init__(self, **answers):
        self.answers = answers
        self.jobs = []

    def run(self, job, seconds):
        self.jobs.append(job)
        found = {"outcome": "ok", "numel": 10, "param_bytes": 20, "seconds": [0.5] * job.steps}
        found |= {"loss_before": 10.0, "loss_after": 9.0, "context": 400_000_000}
        found |= {"peak_allocated": 14_000_000_000, "peak_reserved": 14_500_000_000}
        return {**found, "beside": 500_000_000, **self.answers}

    def close(self):
        pass


def judged(**answers):
    """What a plan says of ``fit`` for ours and for bitsandbytes' optimizer."""
    plan = gpu.Plan("cuda", lambda: Scripted(**answers), seconds=100)
    plan.copy = {"both": 50e9}
    plan.fit("llama-7b", gpu.PAGED, 1024)
    plan.fit("llama-7b", gpu.BITSANDBYTES, 1024)
    return plan, {target["what"]: target for target in plan.found.targets}


OURS_FITS = "llama-7b, 1024 tokens, PagedCAME8bit, in backward: fits"
THEIRS_FITS = "llama-7b, 1024 tokens, PagedAdamW8bit, in backward: fits"


def test_the_whole_card_counts():
    plan, targets = judged()
    assert targets[OURS_FITS]["holds"]
    assert "15.00 GB of the card of 16" in targets[OURS_FITS]["got"]
    assert [row["cap_bytes"] for row in plan.found.rows] == [16_000_000_000] * 2
    _, targets = judged(beside=1_600_000_000)
    assert not targets[OURS_FITS]["holds"]
    _, targets = judged(outcome="out of memory", message="OutOfMemoryError: tried")
    assert not targets[OURS_FITS]["holds"]
    _, targets = judged(loss_after=10.0)
    assert not targets[OURS_FITS.replace("fits", "the loss falls")]["holds"]
    assert targets[OURS_FITS]["kind"] == "target"


def test_managed_memory_is_told_apart():
    plan, targets = judged(managed=13_500_000_000, beside=14_000_000_000)
    theirs = targets[THEIRS_FITS]
    assert theirs["kind"] == "of others"
    assert theirs["holds"]
    assert "14.90 GB" in theirs["got"]
    assert "not counted: 13.50 GB of managed memory" in theirs["got"]
    (beside,) = [t for name, t in targets.items() if "tokens/s" in name]
    assert "would take 270 ms of each step besides 500" in beside["got"]
    assert plan.found.rows[1]["managed"] == 13_500_000_000


def test_what_is_refused_is_no_result():
    plan, targets = judged(outcome="refused", message="a cap of 16000000000 bytes, on a card of 8")
    assert plan.found.rows == []
    assert targets == {}
    assert len(plan.found.not_run) == 2


@pytest.mark.parametrize(
    ("paged", "moved", "holds"), [(0.22, 1e9, True), (0.24, 1e9, False), (0.24, 10e9, True)]
)
def test_paging_is_judged_by_what_bounds_it(paged, moved, holds):
    times = [[0.2] * 4, [0.201] * 4, [paged] * 4]
    answers = {
        "times": times,
        "turns": [own[:3] for own in times],
        "copy": {"both": 45e9},
        "paging": [{}, {"moved": 0}, {"moved": moved}],
    }
    plan = gpu.Plan("cuda", lambda: Scripted(**answers), seconds=100)
    plan.compare("llama-7b", 1024)
    resident, bounded = plan.found.targets
    assert resident["holds"]
    assert "+0.50 %" in resident["got"]
    assert bounded["holds"] == holds
    assert [row["ratio_p50"] for row in plan.found.rows] == [
        "1.0000",
        "1.0050",
        f"{paged / 0.2:.4f}",
    ]


def test_the_cap_leaves_room_for_the_driver(monkeypatch):
    total, used, context = 140 << 30, 3 << 30, 1 << 30
    shares = []
    fake = {
        "mem_get_info": lambda: (total - used, total),
        "memory_reserved": lambda: used - context,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda index: types.SimpleNamespace(total_memory=total),
        "set_per_process_memory_fraction": shares.append,
    }
    for name, function in fake.items():
        monkeypatch.setattr(memory_module.torch.cuda, name, function)
    monkeypatch.setattr(memory_module.torch, "ones", lambda n, device: torch.zeros(n))
    meter = memory_module.CudaMeter(16 << 30)
    meter.begin()
    assert meter.context == context
    assert shares == [((16 << 30) - context - memory_module.LATER) / total]
    with pytest.raises(memory_module.Refused, match="on a GPU of"):
        memory_module.CudaMeter(141 << 30).begin()


def test_pieces_that_have_no_time_are_named(worker):
    plan = gpu.Plan("cpu", lambda: worker, seconds=1)
    plan.run()
    assert plan.found.rows == []
    assert plan.found.not_run[0]["what"] == "fit llama-7b, PagedCAME8bit, in backward, 1024"
    assert len(plan.found.not_run) > 10
    assert all("out of time" in one["why"] for one in plan.found.not_run)


def test_every_row_is_written_when_it_is_found(worker, proof, tmp_path):
    (choice,) = proof.job.choices
    row = rows_module.row("cap", proof.job, choice, proof.fits, ("address space", 1))
    found = rows_module.Findings("cpu", tmp_path / "x.csv", tmp_path / "x.json", worker.text)
    for number in (1, 2):
        found.add(row)
        assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + number
        content = json.loads((tmp_path / "x.json").read_text())
        assert [one["part"] for one in content["rows"]] == ["cap"] * number
    found.judge("it fits", False, "it does not")
    found.skip("another", "out of time")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["targets"][0]["text"] == "MISSED target: it fits: it does not"
    assert content["not_run"] == [{"what": "another", "why": "out of time"}]
    with pytest.raises(SystemExit, match="other columns"):
        harness.append([{"other": 1}], tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError("std::bad_alloc"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("terminate called: std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul"), False),
        (RuntimeError("shapes do not match"), False),
        (KeyError("out of memory"), False),
        (OSError(2, "No such file"), False),
    ],
)
def test_shortages_are_told_from_mistakes(error, known):
    assert (memory_module.shortage(error) is not None) == known
