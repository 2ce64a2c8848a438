"""What is in memory at which moment, and what the planner advises."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import transformers

import came8bit
from benchmarks import planner as bench
from came8bit import planner

GIB = planner.GIB
LLAMA = {**bench.SMALL, "model_type": "llama"}
named = cache(planner.named)  # and its traces


def planned(name, key, **settings):
    return planner.estimate(named(name), planner.OPTIMIZERS[key], planner.Setup(**settings))


@pytest.mark.parametrize(
    ("key", "release"), [("came8bit", False), ("came8bit", True), ("adamw", False)]
)
def test_a_whole_step(key, release):
    model = planner.from_config(LLAMA, "", "")
    built = model.workload.build(torch.bfloat16, True, None).train()
    inputs = model.workload.inputs(built, 2, 64, torch.bfloat16)
    makers = {"came8bit": came8bit.CAME8bit, "adamw": partial(torch.optim.AdamW, foreach=True)}

    def step(optimizer):
        model.workload.loss(built, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = makers[key](built.parameters())
    if release:
        came8bit.step_in_backward(optimizer)
    step(optimizer)  # makes the state
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    ignored = [*built.parameters(), *built.buffers(), *state, *inputs.values()]
    with planner.StorageCounter(ignored) as counted:
        step(optimizer)
    setup = planner.Setup("bf16", 2, 64, True, release)
    result = planner.estimate(model, planner.OPTIMIZERS[key], setup)
    assert result.parameters == sum(p.nbytes for p in built.parameters())
    assert result.state.nbytes == sum(tensor.nbytes for tensor in state)
    # AdamW's temporaries are counted, those of came8bit's kernels have a bound.
    without, said = (max(m.nbytes - m.step * left for m in result.moments) for left in (1, 0))
    lowest = without if key == "came8bit" else said
    assert 0.999 * lowest <= counted.peak <= 1.001 * said


# --- moments --------------------------------------------------------------------------------------


def moments(estimate):
    return {moment.name: moment for moment in estimate.moments}


def test_logits_are_twelve_bytes_each():
    found = moments(planned("llama-1b", "came8bit", batch=2, sequence=1000))
    assert found["backward"].logits == 12 * 128_256 * 2000
    assert found["forward"].gradients == 0


def test_released_gradients_are_not_kept():
    settings = {"sequence": 128, "checkpointing": True}
    plain = moments(planned("llama-1b", "adamw-fused", **settings))
    released = moments(planned("llama-1b", "adamw-fused", release=True, **settings))
    assert "step" not in released
    # The tied table has its gradient until the end, where there are three of it.
    assert released["backward"].gradients >= 128_256 * 2048 * 2
    assert released["backward"].nbytes < plain["backward"].nbytes
    assert plain["step"].gradients == 2 * named("llama-1b").numel


def test_an_update_in_the_backward_comes_on_top_of_it():
    settings = {"sequence": 128, "checkpointing": True, "release": True}
    fused, plain = (
        max(m.nbytes for m in planned("llama-1b", key, **settings).moments)
        for key in ("adamw-fused", "adamw")
    )
    assert 0 <= plain - fused <= 2 * named("llama-1b").largest.numel


def test_accumulated_gradients_exist_all_the_time():
    result = planned("gpt2", "came8bit", accumulation=True)
    found = moments(result)
    assert found["forward"].gradients == found["step"].gradients == result.gradients
    assert found["backward"].gradients >= result.gradients


def test_the_peak_is_the_sum_of_its_parts():
    for key in planner.OPTIMIZERS:
        for release in (False, True):
            result = planned("gpt2", key, release=release)
            assert result.peak == sum(result.parts().values())
            assert result.peak == result.resident + max(m.nbytes for m in result.moments)
            assert result.state.nbytes == sum(result.state.device.values()) + result.host


def test_a_given_number_of_activations_is_used():
    result = planned("gpt2", "came8bit", activations=123, release=True)
    assert result.activations_known
    assert result.parts()["activations"] == 123
    shapes = planner.Model("w", "", (planner.Parameter("w", (100, 100)),))
    unknown = planner.estimate(shapes, planner.OPTIMIZERS["came8bit"], planner.Setup())
    assert not unknown.activations_known
    assert unknown.parts()["activations"] == 0


BAD = [
    ({"dtype": "int8"}, "got dtype 'int8', expected one of fp32, bf16, fp16"),
    ({"batch": 0}, "got batch 0"),
    ({"sequence": -1}, "got sequence -1"),
    ({"budget": -1}, "got budget -1"),
    ({"release": True, "accumulation": True}, "cannot be accumulated"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        planner.Setup(**settings)


# --- advice ---------------------------------------------------------------------------------------


def test_ways_get_smaller_and_start_with_what_was_asked():
    model, setup = named("llama-7b"), planner.Setup(sequence=2048)
    found = planner.ways(model, setup)
    assert found[0].setup == setup
    kinds = ["came8bit", "came4bit", "came2bit", "paged-came8bit"]
    assert [way.estimate.optimizer for way in found] == [kind for kind in kinds for _ in range(4)]
    assert min(way.estimate.peak for way in found) == found[-1].estimate.peak
    asked = replace(setup, release=True, checkpointing=True)
    assert [way.setup for way in planner.ways(model, asked)] == [asked] * 4
    accumulating = replace(setup, accumulation=True)
    assert not any(way.setup.release for way in planner.ways(model, accumulating))
    assert len(planner.ways(model, setup, paged=True)) == 4


def test_seven_billion_in_sixteen_and_eight_in_twenty_four():
    # Targets of the package, in units of 10**9 bytes, with nothing left free.
    for name, limit in (("llama-7b", 16e9), ("llama-8b", 24e9)):
        found = planner.ways(named(name), planner.Setup(sequence=2048))
        way = planner.smallest_effort(found, int(limit))
        assert way is not None
        assert way.estimate.peak <= limit
    assert planner.smallest_effort(found, 8 * GIB) is None


def test_the_first_way_that_fits_is_taken():
    found = planner.ways(named("gpt2"), planner.Setup())
    peaks = [way.estimate.peak for way in found]
    assert planner.smallest_effort(found, peaks[0]) is found[0]
    below = planner.smallest_effort(found, peaks[0] - 1)
    assert below is next(way for way in found if way.estimate.peak < peaks[0])


def test_the_largest_batch():
    model = named("gpt2")
    way = planner.ways(model, planner.Setup())[0]
    usable = 7 * GIB
    batch = planner.largest_batch(model, way, usable)
    optimizer = planner.OPTIMIZERS["came8bit"]
    peaks = [
        planner.estimate(model, optimizer, planner.Setup(batch=b)).peak for b in (batch, batch + 1)
    ]
    assert batch > 1
    assert peaks[0] <= usable < peaks[1]
    assert planner.largest_batch(model, way, GIB // 4) == 0


def test_the_longest_sequence():
    model = planner.from_config(LLAMA, "", "")
    way = planner.ways(model, planner.Setup(batch=4, sequence=1000))[-1]
    optimizer = planner.OPTIMIZERS[way.estimate.optimizer]

    def peak(sequence):
        return planner.estimate(
            model, optimizer, replace(way.setup, batch=1, sequence=sequence)
        ).peak

    assert planner.longest_sequence(model, way, peak(1000)) == 1000
    assert planner.longest_sequence(model, way, peak(1000) - 1) == 500
    assert planner.longest_sequence(model, way, peak(500) - 1) == 250
    assert planner.longest_sequence(model, way, peak(planner.SHORTEST)) == planner.SHORTEST
    assert planner.longest_sequence(model, way, peak(planner.SHORTEST) - 1) == 0
    short = replace(way, setup=replace(way.setup, sequence=50))
    assert planner.longest_sequence(model, short, peak(50)) == 50
    assert planner.longest_sequence(model, short, peak(50) - 1) == 0
    # Where activations are given or not known, a shorter sequence changes nothing that is known.
    given = replace(way, setup=replace(way.setup, activations=1))
    assert planner.longest_sequence(model, given, peak(1000)) == 0
    shapes = planner.Model("w", "", (planner.Parameter("w", (100, 100)),))
    assert planner.longest_sequence(shapes, way, GIB) == 0


def test_the_lines_of_python_turn_checkpointing_on(tmp_path):
    """from_pretrained returns a model in eval mode, where transformers ignores checkpointing."""
    work = planner.from_config(LLAMA, "", "").workload
    work.build(torch.float32, False, None).save_pretrained(tmp_path)
    model = planner.from_path(tmp_path)
    batch = dict.fromkeys(("input_ids", "labels"), torch.ones(1, 32, dtype=torch.int64))
    for way in planner.ways(model, planner.Setup(sequence=32, dtype="fp32")):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert not loaded.training
        calls = []
        for layer in loaded.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        text = "\n".join(planner.python_lines(model, way)).replace("'cuda'", "'cpu'")
        names = {"model": loaded, "batch": batch}
        exec(text, names)
        assert loaded.training
        # A layer that is checkpointed runs once more in the backward.
        assert len(calls) == (8 if way.setup.checkpointing else 4)
        if "release" in names:
            names["release"].remove()


def test_the_lines_of_python_run():
    # On a small model that has what transformers' models have; the lines say device='cuda'.
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(100, 64)
            self.head = torch.nn.Linear(64, 100)

        def gradient_checkpointing_enable(self, arguments):
            assert arguments == {"use_reentrant": False}

        def forward(self, tokens):
            loss = self.head(self.table(tokens)).square().mean()
            return type("Output", (), {"loss": loss})()

    model = named("gpt2")
    setups = [
        planner.Setup(quantize_vectors=True),
        planner.Setup(fp32_embeddings=True, min_8bit_size=64, budget=10**9),
    ]
    for setup in setups:
        for way in planner.ways(model, setup):
            text = "\n".join(planner.python_lines(model, way)).replace("'cuda'", "'cpu'")
            assert ("page_budget=" in text) == (
                setup.budget is not None and way.estimate.optimizer == "paged-came8bit"
            )
            assert ("quantize_vectors=True" in text) == setup.quantize_vectors
            small = Small()
            before = small.head.weight.detach().clone().bfloat16()
            names = {"model": small, "batch": {"tokens": torch.tensor([1, 2, 3])}}
            exec(text, names)
            assert not torch.equal(small.head.weight, before)
            assert ("release" in names) == way.setup.release
            if "release" in names:
                names["release"].remove()
