"""What saving and loading need beyond the state itself, measured in a process of its own."""

import pytest

from benchmarks.process_memory import in_a_process
from came8bit.state.layout import plan

MIB = 1 << 20
PARAMETERS, SHAPE = 8, (1024, 2048)
ONE = 4 * 1024 * 2048  # bytes of the largest tensor: fp32 momentum of a parameter
BITS = [(32, 32), (8, 8), (32, 8), (8, 32)]
CASES = [
    ("copy", 32, 32),
    ("save", 8, 8),
    ("save", 32, 32),
    *(("replace", *bits) for bits in BITS),
    ("resume", 8, 8),
    ("resume", 8, 32),
    ("convert", 32, 8),
    ("convert", 8, 32),
]

_MEASURE = """
    import copy
    import torch
    from came8bit import CAME, convert_checkpoint, load_checkpoint, save_checkpoint

    path, count, shape, cases = question

    def make(bits, count, shape):
        params = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(count)]
        optimizer = CAME(params, optim_bits=bits, rounding="nearest")
        for param in params:
            param.grad = torch.ones_like(param)
            optimizer.step()
            param.grad = None
        return optimizer

    def measure(what, bits, other_bits):
        one = make(bits, count, shape)
        save_checkpoint(one, path)
        if what == "copy":
            return peak_of(lambda: copy.deepcopy(one.state_dict()))
        if what == "save":
            return peak_of(lambda: save_checkpoint(one, path))
        del one
        if what == "convert":
            return peak_of(lambda: convert_checkpoint(path, path, optim_bits=other_bits))
        other = make(other_bits, count, shape)
        if what == "resume":
            other.state.clear()
        return peak_of(lambda: load_checkpoint(other, path))

    small = make(8, 1, (300, 300))  # what is imported or set up once
    save_checkpoint(small, path)
    load_checkpoint(small, path)
    answer = [measure(*case) for case in cases]
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """``{case: bytes}`` beyond the level before, a measurement for each of CASES."""
    path = tmp_path_factory.mktemp("memory") / "x"
    answer = in_a_process(_MEASURE, [str(path), PARAMETERS, SHAPE, CASES])
    found = dict(zip(CASES, answer, strict=True))
    print({" ".join(map(str, case)): f"{peak / MIB:.1f} MiB" for case, peak in found.items()})
    return found


def test_the_measurement_sees_a_second_copy(peaks):
    assert peaks["copy", 32, 32] > 0.9 * PARAMETERS * ONE


@pytest.mark.parametrize("bits", [8, 32])
def test_saving_needs_next_to_nothing(peaks, bits):
    """The buffer of the file, and what Python makes of a header."""
    assert peaks["save", bits, bits] < 4 * MIB


@pytest.mark.parametrize("bits", BITS)
def test_replacing_state_needs_one_parameter(peaks, bits):
    """Of 8: as it was saved, as it is kept, a piece between, the buffer for verifying."""
    assert peaks[("replace", *bits)] < 2 * ONE + 8 * MIB


@pytest.mark.parametrize("bits", [(8, 8), (8, 32)])
def test_resuming_needs_one_parameter_beyond_the_state(peaks, bits):
    state = PARAMETERS * plan(SHAPE, optim_bits=bits[1]).nbytes
    assert 0.9 * state < peaks[("resume", *bits)] < state + 2 * ONE + 8 * MIB


@pytest.mark.parametrize("bits", [(32, 8), (8, 32)])
def test_converting_needs_one_parameter(peaks, bits):
    assert peaks[("convert", *bits)] < 2 * ONE + 8 * MIB
