"""The proof on a CPU: what fits under a limit of the address space, what does not, the same bits.

The limit is not chosen but derived. What the model needs by itself is measured: the peak of the
address space without an optimizer, while gradients are thrown away at once. To it come, from the
planner, the bytes through which pages pass and the state that stays resident, and
:data:`CONSTANT`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.memory_cap.job import Job
from benchmarks.memory_cap.launch import Worker
from benchmarks.memory_cap.model import SHAPES
from benchmarks.memory_cap.optimizers import NONE, PLANNED, Choice
from came8bit import planner

CONSTANT = 4 << 20
"""For what allocators round up, kernels' workspace, and Python."""

PAGES_THAT_PASS = 3
"""As many of the largest page are what copies need to overlap."""


@dataclass(frozen=True)
class Allowance:
    """Bytes of address space that a run may take beyond what the process has before.

    Attributes:
        model: measured: parameters, activations, the largest gradients.
        staging: pages pass through them.
        resident: state that is not paged.
        constant: :data:`CONSTANT`.
    """

    model: int
    staging: int
    resident: int
    constant: int = CONSTANT

    @property
    def total(self) -> int:
        """Their sum."""
        return self.model + self.staging + self.resident + self.constant

    def __str__(self) -> str:
        parts = [f"{n / 1e6:.1f}" for n in (self.model, self.staging, self.resident, self.constant)]
        return (
            f"{self.total / 1e6:.1f} MB = {parts[0]} for the model (measured) + {parts[1]} for "
            f"pages that pass + {parts[2]} of resident state + {parts[3]} constant"
        )


def fitting(shape: str) -> Choice:
    """Return what must fit: paged, in backward, :data:`PAGES_THAT_PASS` of the largest page."""
    unlimited = Choice("PagedCAME8bit", released=True)
    (largest, *_) = planned_state(shape, unlimited).pages
    return replace(unlimited, page_budget=PAGES_THAT_PASS * largest)


def failing(fits: Choice) -> tuple[Choice, ...]:
    """Return the same without one of the two savings, or both."""
    return (
        Choice("CAME8bit", released=False),
        Choice("CAME8bit", released=True),
        replace(fits, released=False),
    )


def planned_state(shape: str, choice: Choice) -> planner.State:
    """Return what the planner says of the state, in bf16."""
    model = planner.from_config(SHAPES[shape], shape, "")
    options = planner.Options(itemsize=2, budget=choice.page_budget)
    return planner.OPTIMIZERS[PLANNED[choice.name]].state(model.parameters, options)


def allowance(worker: Worker, job: Job) -> Allowance:
    """Measure what the model of ``job`` needs without an optimizer, and add what paging needs."""
    alone = worker.run(replace(job, choices=(Choice(NONE, True),)))
    (choice,) = job.choices
    state = planned_state(job.shape, choice)
    return Allowance(alone["peak_address_space"], state.staging, sum(state.device.values()))


def run_limited(worker: Worker, job: Job, beyond: int) -> dict[str, Any]:
    """Run ``job`` within ``beyond`` bytes of address space; see :meth:`Worker.run`.

    Not every library looks whether it was given memory: a process may die of the limit without a
    word. That counts as out of memory if the same job runs to its end without the limit.
    """
    result = worker.run(job, beyond)
    if result["outcome"] == "died" and worker.run(job)["outcome"] == "ok":
        result["outcome"] = "out of memory"
    return result


@dataclass
class Proof:
    """What :func:`prove` has found.

    Attributes:
        allowed: the limit.
        free: the dense optimizer with ordinary steps, without a limit.
        fits: paged, in backward, under the limit; it saves in the middle and goes on.
        resumed: another process, under the same limit, that goes on from what was saved.
        failed: the others under the limit, in the order of :func:`failing`.
        job: what fits.
    """

    allowed: Allowance
    free: dict[str, Any]
    fits: dict[str, Any]
    resumed: dict[str, Any]
    failed: list[dict[str, Any]]
    job: Job


def prove(worker: Worker, job: Job) -> Proof:
    """Run everything; ``job`` gives shape, sizes, ``folder`` and ``save_after``."""
    job = replace(job, choices=(fitting(job.shape),))
    others = failing(job.choices[0])
    allowed = allowance(worker, replace(job, save_after=None))
    free = worker.run(replace(job, choices=others[:1], save_after=None))
    fits = run_limited(worker, job, allowed.total)
    resumed: dict[str, Any] = {"outcome": "not run"}
    if fits["outcome"] == "ok":
        resumed = run_limited(worker, replace(job, resume=True, save_after=None), allowed.total)
    failed = [
        run_limited(worker, replace(job, choices=(choice,), save_after=None), allowed.total)
        for choice in others
    ]
    return Proof(allowed, free, fits, resumed, failed, job)
