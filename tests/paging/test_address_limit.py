"""Training with less address space than the state has bytes, which only real paging survives.

Each run is a process of its own. It has imported everything, makes the model, its gradients and
the optimizer, and then limits its address space (``RLIMIT_AS``) to what it has, one eighth of the
state's bytes, and :data:`CONSTANT`. File mappings count, as memory does.
"""

import json
import os
import sys
import textwrap

import pytest
from processes import run_python

CONSTANT = 4 << 20
"""For the interpreter, activations, and the statistics and counters that stay resident."""

STEPS = 3

RUNS = {
    "dense 8": ("CAME8bit", {}),
    "dense 32": ("CAME32bit", {}),
    "paged 8": ("PagedCAME8bit", {"limited": True}),
    "paged 32": ("PagedCAME32bit", {"limited": True, "page_dir": "."}),
    # State in memory, one mapping of the file, and windows that all stay open.
    "in memory": ("CAME32bit", {"limited": True}),
    "whole file": ("PagedCAME32bit", {"limited": True, "whole": True}),
    "all windows": ("PagedCAME32bit", {"limited": True, "page_budget": 1 << 30}),
}

TRAIN = """
    import hashlib, json, mmap, os, resource, sys
    import torch
    import came8bit
    from benchmarks.process_memory import reset_peak, status
    from came8bit.state.layout import state_bytes

    def backward(model, t):
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(t))
        (model(x).square().mean() * 1e3).backward()

    def train(constant, steps, name, limited=False, whole=False, **options):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(36)]
        model = torch.nn.Sequential(*layers)
        backward(model, 0)  # makes the gradients, and what PyTorch keeps for itself
        optimizer = getattr(came8bit, name)(model.parameters(), lr=1e-4, **options)
        bits = 8 if "8bit" in name else 32
        state = state_bytes([p.shape for p in model.parameters()], optim_bits=bits)
        reset_peak()
        before, size = status("VmRSS"), status("VmSize")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (size + state // 8 + constant, hard))
        for t in range(steps):
            if t:
                optimizer.zero_grad(set_to_none=False)
                backward(model, t)
            optimizer.step()
            if whole:  # what a run would need that maps all of its file at once
                file = optimizer._store.pager._file
                mmap.mmap(file._fd, file._end)
        peak, address_space = status("VmHWM"), status("VmPeak")
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(p.detach().numpy().tobytes())
        for _, saved in sorted(optimizer.state_dict()["state"].items()):
            for _, tensor in sorted(saved.items()):
                digest.update(tensor.numpy().tobytes())
            assert saved["step"] == steps
        return {
            "digest": digest.hexdigest(),
            "state": state,
            "resident": peak - before,
            "address_space": address_space - size,
        }

    torch.set_num_threads(1)
    constant, steps, runs = json.loads(sys.argv[1])
    for what, (name, options) in runs.items():
        if os.fork() == 0:
            try:
                result = train(constant, steps, name, **options)
            except Exception as error:
                result = {"error": str(error)}
            os.write(1, (json.dumps([what, result]) + "\\n").encode())
            os._exit(0)
        os.wait()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name of a run -> what it found out, or its complaint."""
    question = json.dumps([CONSTANT, STEPS, RUNS])
    package = os.path.dirname(os.path.dirname(sys.modules["came8bit"].__file__))
    # What is freed goes back to the system at once, so that nothing else grows by chance.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": package}
    pages = tmp_path_factory.mktemp("pages")
    done = run_python("-c", textwrap.dedent(TRAIN), question, cwd=pages, timeout=None, **settings)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == RUNS.keys()
    for what, result in found.items():
        print(what, result)
    return found


@pytest.mark.parametrize(("dense", "paged"), [("dense 8", "paged 8"), ("dense 32", "paged 32")])
def test_same_bits_in_an_eighth_of_the_address_space(results, dense, paged, record_property):
    expected, got = results[dense], results[paged]
    record_property("peak", {dense: expected, paged: got})
    assert "error" not in got, got
    assert got["digest"] == expected["digest"]
    assert got["address_space"] <= got["state"] // 8 + CONSTANT < got["state"]
    # What was in memory is less, too: pages leave it when their window closes.
    assert expected["resident"] - got["resident"] >= 0.75 * got["state"]


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("in memory", "allocate memory"),
        ("whole file", "Cannot allocate memory"),
        ("all windows", "lower page_budget=, or raise the limit"),
    ],
)
def test_what_does_not_page_fails(results, what, complaint):
    assert complaint in results[what].get("error", "nothing")
