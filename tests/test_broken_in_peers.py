"""What other 8-bit or memory-efficient optimizers get wrong, each as a test of this one.

The faults were found by running the optimizers named in the docstrings.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import sys

import accelerate
import pytest
import tolerances
import torch
from came_pytorch import CAME as OfficialCAME
from peak import step_peak
from training import assert_same, gradients, run, snapshot, start

from came8bit import CAME, CAME8bit, CAME32bit, kernel_status
from came8bit.reference.quant import dequantize_blockwise
from came8bit.state.layout import plan, state_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved_and_loaded(optimizer, params):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = type(optimizer)(params)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ["smallest", "last_two"])
def test_01_rows_without_gradient_do_not_move(dtype, view):
    """Codes without an exact zero move untouched embedding rows by 28 lr in 200 steps."""
    param = start((64, 256), dtype)
    before = param.detach().clone()
    optimizer = CAME8bit([param], lr=1e-2, factored_view=view)
    for g in gradients((64, 256), steps=200):
        g[10:20] = 0
        g[:, 100:110] = 0
        run(optimizer, param, [g])
    assert torch.equal(param[10:20], before[10:20])
    assert torch.equal(param[:, 100:110], before[:, 100:110])
    assert not torch.equal(param[20:, :100], before[20:, :100])


def test_02_an_outlier_row_does_not_blur_other_rows():
    """Blocks of 2,048 rows instead of 2,048 values: 22 % error on all other rows."""
    param, exact = start((512, 256)), start((512, 256))
    g = next(gradients((512, 256), steps=1))
    g[0] *= 1e4
    optimizer, full = CAME8bit([param]), CAME32bit([exact])
    run(optimizer, param, [g])
    run(full, exact, [g])
    state = optimizer.state[param]
    assert state["absmax"].shape == (512, 1)
    got = dequantize_blockwise(state["exp_avg"], state["absmax"])[1:]
    wanted = full.state[exact]["exp_avg"][1:]
    assert ((got - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_03_loading_does_not_cast_the_state(dtype):
    """bf16 averages never move again (0.999 x rounds to x); fp16 ones become NaN."""
    shape = (64, 96)
    param = start(shape, dtype)
    optimizer = CAME8bit([param], lr=1e-3)
    run(optimizer, param, gradients(shape, steps=3))
    resumed_param = param.detach().clone().requires_grad_()
    resumed = saved_and_loaded(optimizer, [resumed_param])
    before = resumed.state[resumed_param]["exp_avg_sq_row"].clone()
    more = [1e-3 * g for g in gradients(shape, steps=3, seed=1)]
    run(optimizer, param, more)
    run(resumed, resumed_param, more)
    state = resumed.state[resumed_param]
    assert state["exp_avg_sq_row"].dtype == torch.float32
    assert (state["exp_avg_sq_row"] < before).all()
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_04_state_holds_tensors_only():
    """A string in the state became a generator on load, and the whole state was discarded."""
    params = [start(shape) for shape in [(64, 96), (7,), (), (4096, 1)]]
    optimizer = CAME8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for state in optimizer.state.values():
        assert all(type(value) is torch.Tensor for value in state.values())
    json.dumps(optimizer.state_dict()["param_groups"])  # and groups are plain data


@pytest.mark.parametrize("shape", [(64, 96), (300,)])
def test_05_second_moments_follow_a_drop(shape):
    """8-bit second moments freeze: 4.2 times too large 1,500 steps after gradients shrink."""
    param = start(shape)
    optimizer = CAME8bit([param], lr=0.0)
    large, small = gradients(shape, steps=2)
    run(optimizer, param, [large] * 50)
    run(optimizer, param, [small * 1e-3] * 1500)
    name = "exp_avg_sq_row" if len(shape) == 2 else "exp_avg_sq"
    g2 = large.double().square(), (small * 1e-3).double().square()
    first, then = (x.mean(-1) if len(shape) == 2 else x for x in g2)
    wanted = (first * (1 - 0.999**50)) * 0.999**1500 + then * (1 - 0.999**1500)
    got = optimizer.state[param][name].view(-1)
    # 1,550 roundings of a number that shrinks by 0.1 % a step, all in one direction at worst.
    assert ((got - wanted).abs() <= 1550 * tolerances.U * 2 * wanted).all()


def test_06_momentum_of_vectors_is_not_scaled_in_place():
    """``update = exp_avg; update.mul_(lr)`` shrinks the stored momentum (came-pytorch <= 0.1.2)."""
    param = start((64,))
    optimizer = CAME8bit([param], lr=1e-3)
    g = next(gradients((64,), steps=1))
    run(optimizer, param, [g, g])
    official_param = start((64,))
    official = OfficialCAME([official_param], lr=1e-3)
    run(official, official_param, [g, g])
    got, wanted = (
        o.state[p]["exp_avg"] for o, p in ((optimizer, param), (official, official_param))
    )
    assert torch.allclose(got, wanted, rtol=1e-5)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_07_one_bad_element_does_not_poison_anything(dtype, bad):
    """All peers but one lose every parameter for good."""
    shape = (64, 96)
    param, clean = start(shape, dtype), start(shape, dtype)
    optimizer, other = CAME8bit([param], lr=1e-3), CAME8bit([clean], lr=1e-3)
    grads = list(gradients(shape, steps=6))
    poisoned = grads[3].clone()
    poisoned[5, 7] = bad
    run(optimizer, param, [*grads[:3], poisoned, *grads[3:]])
    run(other, clean, grads)
    assert torch.equal(param, clean)
    assert optimizer.skipped_steps() == 1


def test_08_grad_scaler_skips_the_step():
    """Declaring ``_step_supports_amp_scaling`` without honouring ``found_inf`` ignores the skip."""
    model = torch.nn.Linear(64, 64)
    optimizer = CAME8bit(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def backward(scale):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 64)).sum() * scale).backward()

    backward(1.0)
    scaler.step(optimizer)
    scaler.update()
    before = snapshot(optimizer)
    backward(math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, snapshot(optimizer))
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_steps() == 0
    backward(1.0)
    scaler.step(optimizer)
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


def test_08_grad_scaler_unscales_before_the_step():
    weights = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = CAME8bit(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 64)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_10_low_precision_parameters_move_at_a_small_lr(dtype):
    """Nearest rounding loses updates of less than half a unit: displacement 0 after 300 steps."""
    torch.manual_seed(0)
    shape, lr, steps = (128, 128), 2e-6, 300
    begin = (torch.rand(shape) + 0.5).to(dtype)
    direction = torch.randn(shape)
    moved = {}
    for name, kind, options in (
        ("exact", torch.float32, {}),
        ("stochastic", dtype, {}),
        ("nearest", dtype, {"rounding": "nearest"}),
    ):
        param = begin.to(kind, copy=True).requires_grad_()
        # Without the correction the first updates are large enough even for nearest rounding.
        optimizer = CAME8bit([param], lr=lr, bias_correction=True, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            g = direction + torch.randn(shape, generator=generator)
            run(optimizer, param, [g.to(kind)])
        moved[name] = ((param.detach().double() - begin.double()) * -direction.sign()).mean().item()
    assert moved["exact"] > steps * lr * 0.1
    assert moved["stochastic"] == pytest.approx(
        moved["exact"], rel=tolerances.SMALL_LR_DISPLACEMENT
    )
    assert abs(moved["nearest"]) < 0.2 * moved["exact"]


@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((320, 320, 3, 3), 1.2),  # 9.3 B/param in the official view
        ((640, 320, 1, 1), 1.2),  # 20
        ((768, 1, 7, 7), 1.3),  # depthwise: 49 values and a scale, 17 statistics
        ((512, 512, 3), 1.1),
        ((64, 3, 7, 7), 1.5),
        ((4096, 8), 2.51),  # LoRA
        ((8, 4096), 2.02),
        ((4096, 1), 8.01),
        ((8, 1024, 512), 1.04),  # experts
    ],
)
def test_11_convolutions_do_not_cost_more_than_adamw(shape, bound):
    """Factoring the last two dimensions of a 3x3 convolution stores 9 to 25 B/param."""
    assert state_bytes([shape]) / math.prod(shape) <= bound
    assert plan(shape).nbytes <= plan(shape, factored_view="last_two").nbytes


@pytest.mark.skipif(not kernel_status().cpu.loaded, reason="the reference does use temporaries")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shapes", [[[25152, 1024]], [[4096, 4096], [4096]], [[512, 512, 3, 3], [2_000_000]]], ids=str
)
def test_12_no_scratch_of_the_size_of_a_parameter(shapes, dtype):
    """Eager 8-bit versions take 16 to 28 B per parameter of the largest tensor."""
    extra, nbytes = step_peak(shapes, dtype)
    allowed = tolerances.STEP_EXTRA_FRACTION * nbytes + tolerances.STEP_EXTRA_BYTES
    assert extra <= allowed


def test_13_nothing_grows_with_the_schedule():
    """A cache keyed by lr had 500 entries after 500 scheduled steps."""
    param = start((64, 96))
    optimizer = CAME8bit([param])
    g = next(gradients((64, 96), steps=1))
    run(optimizer, param, [g])

    def sizes():
        held = [v for v in vars(optimizer).values() if hasattr(v, "__len__")]
        return [len(v) for v in held], len(optimizer.state[param])

    before = sizes()
    for t in range(500):
        optimizer.param_groups[0]["lr"] = 1e-4 / (t + 1)
        run(optimizer, param, [g])
    assert sizes() == before


def test_13_state_holds_no_scratch():
    """``state["RMS"]`` that nobody reads; 0.5 to 16 B/param of scratch kept in the state."""
    param = start((64, 96))
    optimizer = CAME8bit([param])
    run(optimizer, param, gradients((64, 96), steps=1))
    state = optimizer.state[param]
    assert sum(t.untyped_storage().nbytes() for t in state.values()) == plan((64, 96)).nbytes
    assert [buffer.name for buffer in plan((64, 96)).buffers] == list(state)


def test_14_channels_last_strides_and_views_survive():
    """``.contiguous()`` replaced strides and detached views."""
    param = start((32, 16, 3, 3)).detach().to(memory_format=torch.channels_last).requires_grad_()
    address = param.data_ptr()
    run(CAME8bit([param]), param, gradients((32, 16, 3, 3), steps=2))
    assert param.data_ptr() == address
    assert param.is_contiguous(memory_format=torch.channels_last)
    base = torch.randn(96, 64)
    view = base[8:40].t().requires_grad_()
    before = base.clone()
    run(CAME8bit([view]), view, gradients((64, 32), steps=1))
    changed = (base != before).any(1)
    assert changed[8:40].all()
    assert not changed[:8].any()
    assert not changed[40:].any()


def test_14_optim_bits_of_a_group_is_used():
    """Per-group ``optim_bits`` was ignored."""
    small, large = start((64, 96)), start((64, 96))
    groups = [{"params": [small], "optim_bits": 8}, {"params": [large], "optim_bits": 32}]
    for cls in (CAME, CAME8bit, CAME32bit):
        optimizer = cls(copy.deepcopy(groups))
        params = [group["params"][0] for group in optimizer.param_groups]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [optimizer.state[p]["exp_avg"].element_size() for p in params] == [1, 4]


def test_14_the_scheduler_beats_the_constructor():
    """An override of ``lr`` won over the scheduler."""
    param = start((8, 8))
    optimizer = CAME8bit([{"params": [param], "lr": 1e-2}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    g = next(gradients((8, 8), steps=1))
    run(optimizer, param, [g])
    scheduler.step()
    before = param.detach().clone()
    run(optimizer, param, [g])
    assert torch.equal(param, before)


def test_14_no_tensor_of_the_state_is_shared():
    """A code table shared by all parameters makes safetensors refuse to save."""
    params = [start((64, 96)), start((64, 96)), start((7,))]
    optimizer = CAME8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = list(itertools.chain.from_iterable(s.values() for s in optimizer.state.values()))
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_15_nothing_is_allocated_or_cached_at_construction():
    """accelerate loads an empty state in prepare(); FSDP2 swaps parameters for others."""
    placeholders = [torch.nn.Parameter(torch.empty(1)) for _ in range(2)]
    optimizer = CAME8bit(placeholders)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    real = [start((64, 96)), start((7,))]
    for group in optimizer.param_groups:
        group["params"] = real
    for p in real:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(real)


def test_15_accelerate_prepares_steps_and_resumes(tmp_path):
    """prepare() loads the empty state; save_state and load_state go through files."""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 96)
    model, optimizer = accelerator.prepare(model, CAME8bit(model.parameters(), lr=1e-3))

    def train(steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(8, 64, generator=generator)).square().mean())
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    train(3, seed=0)
    accelerator.save_state(str(tmp_path))
    unbroken = train(3, seed=1)
    accelerator.load_state(str(tmp_path))
    resumed = train(3, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(unbroken, resumed, strict=True))


@pytest.mark.slow
def test_decay_reaches_zero():
    """64 of 256 columns stop getting gradients; 8-bit momentum must not keep them moving.

    With nearest rounding small codes are fixed points of m <- beta1 m, their column's instability
    falls to their square, and the update grows to the size of lr: for ever.
    """
    shape, dead, steps = (16, 256), slice(0, 64), 20_000
    pool = list(gradients(shape, steps=64))
    stopped = [g.clone() for g in pool]
    for g in stopped:
        g[:, dead] = 0
    travelled = {}
    for cls in (CAME8bit, CAME32bit):
        param = torch.nn.Parameter(torch.zeros(shape))
        optimizer = cls([param], lr=1.0, min_8bit_size=0)
        for t in range(steps):
            param.grad = (pool if t < 50 else stopped)[t % 64]
            optimizer.step()
            if t + 1 in (250, steps):
                travelled[cls, t + 1] = param.detach()[:, dead].norm().item()
    assert optimizer.state[param]["exp_avg"].shape == shape
    wanted = travelled[CAME32bit, steps]
    assert travelled[CAME8bit, steps] == pytest.approx(wanted, rel=tolerances.DEAD_COLUMNS)
    assert travelled[CAME8bit, steps] == pytest.approx(travelled[CAME8bit, 250], rel=1e-3)
