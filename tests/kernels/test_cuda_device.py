"""The CUDA kernels and the device: streams, graphs, memory, sizes beyond 32 bits, launches.

All of it needs a GPU; without one the tests are skipped, and ``make gpu-report`` counts that as a
failure.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import pytest
import torch
from on_gpu import check_kernels, check_step, needs_gpu, needs_real_gpu, to_gpu
from passes import KINDS, Passes, run_all
from problems import Problem, assert_same_bits, generator, make_problem, random_grad, run_ops
from shim.cases import GROUP, run_reference

from came8bit import CAME, CAME8bit
from came8bit.reference import quant
from came8bit.reference.reduction import CUDA_TREE

pytestmark = [pytest.mark.cuda, needs_gpu, needs_real_gpu]

SHAPES: list[tuple[int, ...]] = [(300, 520), (64, 256), (2, 40, 300), (1000, 33)]


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_loaded() -> None:
    check_kernels()


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within it a call of torch that waits for the device is an error, also a blocking copy."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def problems() -> list[Problem]:
    return [
        make_problem(s, batched=len(s) == 3, dtype=torch.bfloat16, index=i, generator=generator(i))
        for i, s in enumerate(SHAPES)
    ]


def gradients(seed: int) -> list[torch.Tensor]:
    return [random_grad(s, torch.bfloat16, generator(seed + i)) for i, s in enumerate(SHAPES)]


def parameters(count: int = 20) -> list[torch.nn.Parameter]:
    """Matrices and vectors on the device, with gradients."""
    made = []
    for i in range(count):
        shape = (64 + i, 8 * (i + 8)) if i % 3 else (96 + i,)
        made.append(torch.nn.Parameter(torch.randn(shape, generator=generator(i)).cuda()))
        made[-1].grad = torch.randn(shape, generator=generator(99 + i)).cuda()
    return made


def busy(seconds: float) -> None:
    """Keep the current stream busy for about that long, at 1.5 GHz."""
    torch.cuda._sleep(int(seconds * 1.5e9))


# --- streams, graphs, synchronisation -------------------------------------------------------------


def test_the_current_stream_is_used() -> None:
    """The gradient arrives late, on a side stream; kernels of another stream would miss it."""
    expected = problems()
    got = [to_gpu(p) for p in expected]
    late = [torch.zeros_like(g, device="cuda") for g in gradients(0)]
    real = [g.cuda() for g in gradients(0)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy(0.05)
        for target, source in zip(late, real, strict=True):
            target.copy_(source)
        run_ops(got, late)
    stream.synchronize()
    for mine, other, grad in zip(got, expected, gradients(0), strict=True):
        run_reference(other, grad)
        found = {name: x.cpu() for name, x in mine.tensors().items()}
        assert_same_bits(found, other.tensors(), f"{tuple(other.param.shape)}")


@pytest.mark.parametrize("bits", [32, 8, 4, 2, 0])
def test_a_step_does_not_wait(bits: int) -> None:
    """Neither by torch's account nor by the clock: the device is busy for longer than the step."""
    made = CAME(parameters(), lr=torch.tensor(1e-3, device="cuda"), optim_bits=bits)
    # State is made, and kernels are loaded at their first launch, which may wait.
    made.step()
    made.step()
    busy(1e-3)
    late = torch.cuda.Event()
    with no_synchronisation():
        busy(1.0)
        begin = time.perf_counter()
        made.step()
        seconds = time.perf_counter() - begin
        late.record()
        assert not late.query(), "the device was not busy for long enough to show anything"
    torch.cuda.synchronize()
    assert seconds < 0.5


def test_a_sharded_step_waits_at_one_event() -> None:
    """Where it sees that all ranks have the same gradients; copies and reads do not wait."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, store=store)
    try:
        mesh = init_device_mesh("cuda", (1,))
        plain = parameters()
        cut = [DTensor.from_local(p.detach(), mesh, [Shard(0)]) for p in plain]
        params = [torch.nn.Parameter(p) for p in cut]
        for param, one in zip(params[1:], plain[1:], strict=True):  # the first has no gradient
            param.grad = DTensor.from_local(one.grad, mesh, [Shard(0)])
        optimizer = CAME8bit(params)
        optimizer.step()  # makes state and loads kernels, which may wait
        with no_synchronisation():
            optimizer.step()
        assert int(optimizer.state[params[1]]["step"]) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bits", [8, 4, 2, 0])
def test_steps_in_a_graph(bits: int) -> None:
    """Captured once and replayed, with gradients and lr that change in between."""
    shapes_of = [(p.shape, p.dtype) for p in parameters()]
    rates = [1e-3, 3e-4, 2e-3]
    grads = [
        [torch.randn(shape, generator=generator(1000 * t + i)).cuda()
         for i, (shape, _) in enumerate(shapes_of)]
        for t in range(3)
    ]  # fmt: skip
    results = []
    for captured in (False, True):
        params = parameters()
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = CAME(params, lr=lr, weight_decay=0.1, min_8bit_size=0, optim_bits=bits)
        optimizer.step()  # makes the state
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for rate, new in zip(rates, grads, strict=True):
            lr.fill_(rate)
            for param, grad in zip(params, new, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        results.append([*params, *(x for s in optimizer.state.values() for x in s.values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("kind", ["8 bits", "matrices", "vector"])
def test_passes_in_a_graph(kind: str) -> None:
    """All four, with the sums between them, captured once; one gradient is not finite."""
    results = []
    for captured in (False, True):
        problem = to_gpu(make_problem(dtype=torch.bfloat16, generator=generator(), **KINDS[kind]))
        grad = torch.zeros(problem.param.shape, device="cuda")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if captured:
            with torch.cuda.graph(graph):
                run_all([Passes(problem, problem, grad, None, {"cautious": True})])
        for t in range(4):
            new = random_grad(grad.shape, torch.float32, generator(t))
            new.view(-1)[0] = math.nan if t == 2 else 1.0
            grad.copy_(new)
            if captured:
                graph.replay()
            else:
                run_all([Passes(problem, problem, grad, None, {"cautious": True})])
        torch.cuda.synchronize()
        assert int(problem.state["skipped"]) == 1
        results.append(problem)
    assert_same_bits(results[1].tensors(), results[0].tensors(), kind)


def test_every_step_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the parameters are grouped, and whatever else the device does."""
    results = []
    other = torch.randn(2048, 2048, device="cuda")
    for group_bytes in ("", "1", "100000", str(2**62), ""):
        monkeypatch.setenv(GROUP, group_bytes)
        got = [to_gpu(p) for p in problems()]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                other = torch.tanh(other @ other)
        for t in range(3):
            run_ops(got, [g.cuda() for g in gradients(10 * t)], cautious=True)
        torch.cuda.synchronize()
        results.append(got)
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert_same_bits(mine.tensors(), first.tensors(), "another run")


def test_resumed_on_the_device() -> None:
    """Saved and loaded in between: the same bits as without."""
    straight, resumed = parameters(), parameters()
    first, second = CAME8bit(straight, lr=1e-3), CAME8bit(resumed, lr=1e-3)
    for optimizer in (first, second):
        optimizer.step()
        optimizer.step()
    again = CAME8bit(resumed, lr=1e-3)
    again.load_state_dict(second.state_dict())
    first.step()
    again.step()
    for mine, other in zip(straight, resumed, strict=True):
        assert torch.equal(mine, other)


def test_tensors_on_different_devices_are_refused() -> None:
    problem = to_gpu(make_problem((40, 256), generator=generator()))
    before = problem.copy()
    with pytest.raises(RuntimeError):
        run_ops([problem], [torch.ones(40, 256)])
    assert_same_bits(problem.tensors(), before.tensors(), "after a refused call")


if torch.cuda.device_count() > 1:  # nothing to skip on a machine with one

    def test_the_device_of_the_tensors_is_used() -> None:
        """Not the current one, and that stays what it was."""
        expected = make_problem((300, 520), generator=generator())
        got = to_gpu(expected)
        got.param = got.param.to("cuda:1")
        got.state = {name: x.to("cuda:1") for name, x in got.state.items()}
        grad = random_grad((300, 520), torch.float32, generator(1))
        run_ops([got], [grad.to("cuda:1")])
        assert torch.cuda.current_device() == 0
        run_reference(expected, grad)
        found = {name: x.cpu() for name, x in got.tensors().items()}
        assert_same_bits(found, expected.tensors(), "cuda:1")


# --- memory, launches -----------------------------------------------------------------------------

MEMORY: list[list[tuple[int, ...]]] = [
    [(8192, 8192)],
    [(4096, 4096)] * 4,
    [(2304, 768), (768, 768), (3072, 768), (768, 3072), (768,)] * 6,
    [(11008, 16), (16, 11008)] * 40,
    [(200_000, 64)],
    [(64, 200_000)],
    [(128_256, 4096)],
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shapes", MEMORY, ids=lambda shapes: f"{len(shapes)}x{shapes[0]}")
def test_extra_memory_of_a_step(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """At most 0.5 % of the parameters and 8 MB."""
    params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype, device="cuda")) for s in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = CAME8bit(params)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    free_before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    optimizer.step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 0.005 * sum(p.nbytes for p in params) + 8e6
    # And nothing is taken behind the allocator's back.
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() >= free_before - (8 << 20)


def test_launches_do_not_grow_with_the_number_of_parameters() -> None:
    """As the profiler sees a step: our kernels alone, a few dozen, and no copies."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for count in (24, 240):
        params = [torch.nn.Parameter(torch.randn(96, 128, device="cuda")) for _ in range(count)]
        params += [torch.nn.Parameter(torch.randn(96, device="cuda")) for _ in range(count)]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = CAME8bit(params)
        optimizer.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            optimizer.step()
            torch.cuda.synchronize()
        names = [e.name for e in trace.events() if str(e.device_type).endswith("CUDA")]
        assert any("came8bit" in name for name in names), names
        assert not [name for name in names if name.startswith("Memcpy")], names
        counts.append(len(names))
    assert counts[0] <= 24, counts
    # Descriptions of parameters travel as arguments of kernels, some 60 at a time.
    assert counts[1] <= 40, counts


# --- sizes ----------------------------------------------------------------------------------------


def needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()  # what earlier tests have left
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of GPU memory are free, this takes {gigabytes:.0f}")


def test_a_tile_of_several_strips() -> None:
    """The row sums of a huge matrix; on the shim small ones do that. The smallest there are."""
    shape = (262_200, 264)
    assert CUDA_TREE._grid(1, *shape)[2] == 2
    expected = make_problem(shape, dtype=torch.bfloat16, generator=generator())
    grad = random_grad(shape, torch.bfloat16, generator(1))
    check_step([to_gpu(expected)], [expected], [grad], "two strips")


def test_more_than_2_31_elements_unfactored() -> None:
    """The end of a large parameter has the bits of the same rows on their own."""
    needs_memory(28)
    n, k, tail = 65_544, 32_768, 40
    assert n * k > 2**31
    state = {
        "exp_avg": torch.zeros(n, k, dtype=torch.int8, device="cuda"),
        "absmax": torch.zeros(quant.absmax_shape((n, k)), device="cuda"),
        "exp_avg_sq": torch.zeros(n, k, device="cuda"),
        "step": torch.zeros((), dtype=torch.int64, device="cuda"),
        "skipped": torch.zeros((), dtype=torch.int64, device="cuda"),
    }
    param = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    whole = Problem(param, state, factored=False, index=3)
    part = make_problem(
        (tail, k),
        factored=False,
        dtype=torch.bfloat16,
        offset=(n - tail) * k,
        generator=generator(),
    )
    part.param.zero_()
    grad = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_()
    ends = grad[-tail:].cpu()
    got = to_gpu(part)
    for t in range(2):
        # Without clipping the elements know nothing of each other.
        run_ops([whole], [grad], clip_threshold=math.inf)
        check_step([got], [part], [ends], f"step {t}", clip_threshold=math.inf)
    assert int(state["skipped"]) == 0
    for name in ("param", "exp_avg", "absmax", "exp_avg_sq"):
        assert torch.equal(whole.tensors()[name][-tail:].cpu(), part.tensors()[name]), name


def test_more_than_2_31_elements_factored() -> None:
    """Statistics and updates at the beginning, in the middle and at the end, by the formula."""
    needs_memory(20)
    n, k = 65_544, 32_768
    param = torch.nn.Parameter(torch.zeros(n, k, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_()
    optimizer = CAME8bit([param], lr=1.0, clip_threshold=math.inf, rounding="nearest")
    optimizer.step()
    state = optimizer.state[param]
    assert int(state["step"]) == 1
    r, c = state["exp_avg_sq_row"].double().view(-1), state["exp_avg_sq_col"].double().view(-1)
    res_row = state["exp_avg_res_row"].double().view(-1)
    res_col = state["exp_avg_res_col"].double().view(-1)
    columns = torch.zeros(k, dtype=torch.float64, device="cuda")
    for rows in range(0, n, 4096):
        square = param.grad[rows : rows + 4096].double().square()
        torch.testing.assert_close(r[rows : rows + 4096], 1e-3 * square.mean(1), rtol=1e-4, atol=0)
        columns += square.sum(0)
    torch.testing.assert_close(c, 1e-3 * columns / n, rtol=1e-4, atol=0)
    for row in (0, 1, n // 2, n - 2, n - 1):
        u = param.grad[row].double() * (r.mean() / r[row]).sqrt() / c.sqrt()
        update = 0.1 * u * (res_row.mean() / res_row[row]).sqrt() / res_col.sqrt()
        got = -param.detach()[row].double()
        # One rounding to bf16, and the sums.
        torch.testing.assert_close(got, update, rtol=2.0**-8 + 1e-3, atol=0)
