"""Paged state on a GPU: the same bits, and copies that overlap kernels in a profiler's trace."""

from types import SimpleNamespace

import pytest
import torch
from paged_training import SHAPES, complete, make, train
from training import assert_same

from came8bit import CAME8bit, PagedCAME8bit
from came8bit.paging import transfer
from came8bit.paging.pages import page_layout
from came8bit.state.layout import plan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(cls, dtype=torch.bfloat16, shapes=SHAPES, **options):
    params = [
        p.detach().cuda().requires_grad_()
        for p in make(CAME8bit, dtype, shapes).param_groups[0]["params"]
    ]
    return cls(params, lr=1e-3, weight_decay=0.01, **options)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("budget", [400_000, 1_200_000, 1 << 30])
def test_same_bits_as_dense(budget, in_file, tmp_path):
    options = {"page_budget": budget, "page_dir": tmp_path if in_file else None}
    expected, got = on_gpu(CAME8bit), on_gpu(PagedCAME8bit, **options)
    for first in range(0, 9, 3):
        train(expected, 3, first)
        train(got, 3, first)
        there, here = complete(expected), complete(got)
        assert_same(
            (*there[:1], {k: v.cpu() for k, v in there[1].items()}, there[2]),
            (*here[:1], {k: v.cpu() for k, v in here[1].items()}, here[2]),
        )


@pytest.mark.cuda
@needs_gpu
def test_pages_follow_the_model_to_the_gpu_and_back():
    optimizer, expected = make(PagedCAME8bit), make(CAME8bit)
    train(optimizer, 2)
    train(expected, 2)
    for step, device in ((2, "cuda"), (3, "cpu")):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None
            p.data = p.data.to(device)
        saved = optimizer.state_dict()["state"]
        for index, state in enumerate(expected.state.values()):
            assert all(torch.equal(saved[index][k].cpu(), v) for k, v in state.items())
        if device == "cuda":
            train(optimizer, 1, step)
            state = optimizer.state_dict()
            assert state["state"][0]["exp_avg"].device.type == "cpu"
            for p, q in zip(
                *(o.param_groups[0]["params"] for o in (optimizer, expected)), strict=True
            ):
                q.data = p.data.cpu()
            expected.load_state_dict(state)
        else:
            train(optimizer, 1, step)
            train(expected, 1, step)
            assert_same(complete(expected), complete(optimizer))


@pytest.mark.cuda
@needs_gpu
def test_copies_overlap_kernels():
    """Somewhere in a few steps, a copy in each direction runs while a kernel does."""
    shapes = [(4096, 4096)] * 12
    layout = page_layout(plan(shapes[0]))
    optimizer = on_gpu(PagedCAME8bit, shapes=shapes, page_budget=4 * layout.nbytes)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels = [span for span in spans if not span[0].lower().startswith("mem")]
    for direction in ("HtoD", "DtoH"):
        copies = [span for span in spans if direction in span[0]]
        assert len(copies) >= 3 * 8
        assert any(
            start < kernel_end and kernel_start < end
            for _, start, end in copies
            for _, kernel_start, kernel_end in kernels
        ), f"no copy {direction} overlaps a kernel"


# --- without a GPU: that each call goes to the right stream ---------------------------------------


class Stream:
    def __init__(self, name):
        self.name, self.calls = name, []

    def wait_stream(self, other):
        self.calls.append(("wait stream", other.name))

    def wait_event(self, event):
        self.calls.append(("wait event", event.recorded))


class RecordedEvent:
    recorded = None

    def record(self, stream):
        self.recorded = stream.name

    def query(self):
        return True

    def synchronize(self):
        self.recorded = f"{self.recorded}, synchronized"


def test_queues_are_streams_of_the_device(monkeypatch):
    current, sides, active = Stream("current"), [], []

    def new_stream(device):
        sides.append(Stream(f"side {len(sides)} of {device}"))
        return sides[-1]

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            active.append(self.stream.name)

        def __exit__(self, *exception):
            active.append("left")

    monkeypatch.setattr(
        transfer.torch,
        "cuda",
        SimpleNamespace(
            Stream=new_stream, Event=RecordedEvent, stream=On, current_stream=lambda device: current
        ),
    )
    recorded = []
    real = torch.empty
    monkeypatch.setattr(
        transfer.torch,
        "empty",
        lambda *a, **k: SimpleNamespace(record_stream=lambda s: recorded.append(s.name)),
    )
    queues = transfer.CudaStreams("cuda:1")
    memory = queues.allocate(10)
    monkeypatch.setattr(transfer.torch, "empty", real)
    names = [stream.name for stream in sides]
    assert names == ["side 0 of cuda:1", "side 1 of cuda:1"]
    assert recorded == names  # the memory is not given to others before the copies are done
    assert [stream.calls for stream in sides] == [[("wait stream", "current")]] * 2
    assert memory is not None
    target = torch.zeros(3)
    queues.copy("h2d", target, torch.ones(3))
    assert active == [names[0], "left"]
    assert torch.equal(target, torch.ones(3))
    events = {queue: queues.record(queue) for queue in ("compute", "h2d", "d2h")}
    assert [event.recorded for event in events.values()] == ["current", *names]
    queues.wait("d2h", events["compute"])
    queues.wait("compute", events["h2d"])
    queues.wait("h2d", events["d2h"])
    assert sides[1].calls[-1] == ("wait event", "current")
    assert current.calls == [("wait event", names[0])]
    assert sides[0].calls[-1] == ("wait event", names[1])
    assert queues.done(events["h2d"]) is True
    queues.synchronize(events["d2h"])
    assert events["d2h"].recorded == f"{names[1]}, synchronized"
