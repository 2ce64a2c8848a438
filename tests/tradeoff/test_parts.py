"""The parts of ``came8bit tradeoff``: presets, data, measures, noise."""

import json
import string
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_images import write_fashion_mnist

import came8bit
from came8bit.tradeoff import report as noise
from came8bit.tradeoff import report as stats
from came8bit.tradeoff import results as store
from came8bit.tradeoff.config import ALL_OPTIMIZERS, PRESETS, RunSpec, preset_config
from came8bit.tradeoff.data import (
    Images,
    Windows,
    eval_items,
    load_images,
    load_text,
    split_text,
    train_items,
)
from came8bit.tradeoff.measure import PeakMemory, state_bytes, wide_fraction
from came8bit.tradeoff.models import build_model
from came8bit.tradeoff.study import Study
from came8bit.tradeoff.train import RunResult, failed_run

# ---- presets ----


def test_quick_preset_keeps_its_promises():
    config = preset_config("quick")
    (task,) = config.tasks
    assert len(config.seeds) >= 2
    assert task.steps >= 200
    assert not config.tune
    for name in ALL_OPTIMIZERS:
        assert config.learning_rates["text"][name] in config.grids["text"][name]
    with torch.device("meta"):
        model = build_model(task)
    assert wide_fraction(model) >= 0.8
    with pytest.raises(AssertionError):  # the measure can say no
        assert wide_fraction(torch.nn.Linear(1000, 255)) >= 0.8


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_build_and_can_be_searched(name):
    config = preset_config(name)
    for task in config.tasks:
        assert task.kind in config.grids
        assert task.width % task.heads == 0
        with torch.device("meta"):
            assert wide_fraction(build_model(task)) >= 0.8
        if not config.tune:
            assert set(config.learning_rates[task.kind]) == set(ALL_OPTIMIZERS)


# ---- data ----


def test_the_split_is_contiguous_and_does_not_leak():
    data = split_text(b"a" * 900 + b"b" * 50 + b"c" * 50, {})
    task = replace(PRESETS["quick"].tasks[0], context=4, steps=50, batch_size=2, eval_items=100)
    for items, letter in (
        (train_items(data, task, seed=0), "a"),
        (eval_items(data, task, "tune"), "b"),
        (eval_items(data, task, "validation"), "c"),
    ):
        seen = {int(value) for window in items for part in window for value in part}
        assert seen == {ord(letter)}


def test_windows_predict_the_next_byte_and_evaluation_windows_do_not_overlap():
    text = string.printable.encode() * 40
    data = split_text(text, {})
    task = replace(PRESETS["quick"].tasks[0], context=10, batch_size=4, eval_items=1000)
    items = eval_items(data, task, "validation")
    assert isinstance(items, Windows)
    assert len(items) == 16  # of 200 bytes: 19 windows with a target each, in whole batches
    covered = []
    for inputs, targets in items:
        assert inputs.tolist()[1:] == targets.tolist()[:-1]
        covered.append(bytes(targets.tolist()))
    tail = text[-200:]
    places = [tail.find(piece) for piece in covered]
    assert len(covered) == 16
    assert all(place >= 0 for place in places)


def test_training_windows_depend_on_the_seed_alone():
    data = split_text(bytes(range(256)) * 20, {})
    task = replace(PRESETS["quick"].tasks[0], context=8, steps=5, batch_size=2)

    def first_inputs(seed):
        return torch.stack([window[0] for window in train_items(data, task, seed)])

    assert torch.equal(first_inputs(3), first_inputs(3))
    assert not torch.equal(first_inputs(3), first_inputs(4))
    assert first_inputs(3).shape == (10, 8)


def test_the_standard_library_is_text_that_every_machine_has():
    one = load_text(None, "stdlib", Path("nowhere"))
    two = load_text(None, "stdlib", Path("nowhere"))
    assert one.about == two.about
    assert one.about["bytes"] > 3_000_000
    assert len(one.train) + len(one.tune) + len(one.validation) == one.about["bytes"]


def test_files_are_joined_in_the_order_given(tmp_path):
    for name, content in (("b.txt", b"second"), ("a.txt", b"first")):
        (tmp_path / name).write_bytes(content)
    text = load_text([tmp_path / "b.txt", tmp_path / "a.txt"], "stdlib", tmp_path)
    whole = np.concatenate([text.train, text.tune, text.validation]).tobytes()
    assert whole == b"second\nfirst"


def test_images_are_split_apart(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    data = load_images(tmp_path)
    assert isinstance(data, Images)
    assert [len(part[1]) for part in (data.train, data.tune, data.validation)] == [200, 5000, 40]
    task = replace(PRESETS["standard"].tasks[1], steps=10, batch_size=50, eval_items=40)
    items = train_items(data, task, seed=0)
    assert len(items) == 500  # two and a half passes over 200
    image, label = items[0]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    assert 0 <= int(label) < 10


# ---- measures ----


def parameters(*shapes):
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def stepped(make, params):
    optimizer = make(params)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_has_eight_bytes_and_a_step_count(fused):
    params = parameters((300, 400), (400,))
    counted = state_bytes(stepped(lambda p: torch.optim.AdamW(p, fused=fused), params))
    assert counted.total == 8 * (300 * 400 + 400) + 4 * 2
    assert counted.by_dtype == {"float32": counted.total}
    assert counted.python_numbers == 0


def test_tables_that_parameters_share_count_once():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters((256, 256), (512, 256))
    elements = 256 * 256 + 512 * 256
    counted = state_bytes(stepped(bitsandbytes.optim.AdamW8bit, params))
    blocks = elements // 256
    assert counted.total == 2 * elements + 2 * 4 * blocks + 2 * 256 * 4
    assert counted.by_dtype["uint8"] == 2 * elements
    assert counted.python_numbers == 2  # its step counts


def test_came8bit_has_one_byte_and_its_statistics():
    params = parameters((512, 768), (100,))
    counted = state_bytes(stepped(came8bit.CAME8bit, params))
    codes, blocks = 512 * 768, 512 * 3
    factored = codes + 4 * blocks + 4 * 2 * (512 + 768) + 4 + 8 + 8  # rms_ratio, step, skipped
    unfactored = 8 * 100 + 8 + 8
    assert counted.total == factored + unfactored
    assert counted.by_dtype["int8"] == codes


def test_views_count_their_whole_storage_once():
    params = parameters((4,), (4,))
    optimizer = torch.optim.SGD(params, lr=1.0)
    buffer = torch.zeros(100)
    optimizer.state[params[0]] = {"half": buffer[:4], "nested": [{"more": buffer[4:8]}], "n": 3}
    optimizer.state[params[1]] = {"half": buffer[8:12], "flag": True, "none": None, "name": "x"}
    counted = state_bytes(optimizer)
    assert counted.total == 400
    assert counted.python_numbers == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_touched_and_given_back():
    memory = PeakMemory(torch.device("cpu"))
    size = 64 * 2**20
    touched = torch.ones(size, dtype=torch.uint8)
    del touched
    above = memory.above_start()
    assert above is not None
    assert size * 0.95 < above < size * 1.3
    assert PeakMemory(torch.device("cpu")).above_start() < size / 4  # and is set back


# ---- noise ----


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062047), (2, 4.30265273), (4, 2.77644511), (29, 2.04522964)]
)
def test_quantiles_of_student_t(degrees, expected):
    assert stats.t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-8)


def test_paired_interval_by_hand():
    result = stats.paired({0: 1.0, 1: 2.0, 2: 4.0, 9: 0.0}, {0: 0.5, 1: 1.0, 2: 2.5})
    assert result.pairs == 3  # seed 9 has no partner
    assert result.difference == pytest.approx(1.0)
    assert result.deviation == pytest.approx(0.5)
    half = 4.30265273 * 0.5 / 3**0.5
    assert (result.low, result.high) == pytest.approx((1 - half, 1 + half))
    assert result.outside_noise is False
    assert stats.paired({0: 1.0}, {1: 1.0}) is None
    assert stats.paired({0: 1.0}, {0: 3.0}).outside_noise is None


def study_with(losses):
    """Return a finished study with these losses: optimizer → seed → loss."""
    config = replace(preset_config("quick"), seeds=(0, 1, 2, 3))
    study = Study(config, state="complete")
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            run = failed_run(RunSpec("final", config.tasks[0], name, seed, 1e-3), "")
            run.status, run.error, run.loss, run.loss_parts = "ok", None, loss, [loss] * 32
            study.runs.append(run)
    return study


def test_words_tell_noise_from_difference():
    level = {0: 2.0, 1: 2.3, 2: 1.9, 3: 2.1}  # seeds differ by far more than optimizers
    study = study_with(
        {
            "adamw": {seed: loss + 0.05 + 0.001 * seed for seed, loss in level.items()},
            "came": {seed: loss + 0.003 * (-1) ** seed for seed, loss in level.items()},
            "came8bit": level,
        }
    )
    words = "\n".join(noise.in_words(study, study.config.tasks[0]))
    assert "CAME8bit − AdamW: -0.0515 nat per byte [-0.0536, -0.0494], 4 seeds: " in words
    assert "**outside the noise**, CAME8bit is better" in words
    assert "0.0000 nat per byte [-0.0055, +0.0055], 4 seeds: **inside the noise**" in words
    assert "Not shown to be equal: up to 0.0055 apart" in words


def test_words_are_honest_about_two_seeds_and_one():
    two = study_with({"came": {0: 2.0, 1: 2.1}, "came8bit": {0: 2.01, 1: 2.12}})
    assert "± 9.0 standard deviations" in "\n".join(noise.in_words(two, two.config.tasks[0]))
    one = study_with({"came": {0: 2.0}, "came8bit": {0: 2.5, 1: 2.1}})
    assert "no interval" in "\n".join(noise.in_words(one, one.config.tasks[0]))
    alone = study_with({"came8bit": {0: 2.5}})
    assert "nothing to compare" in "\n".join(noise.in_words(alone, alone.config.tasks[0]))


def test_results_hold_no_nan(tmp_path):
    study = study_with({"came8bit": {0: 2.5}})
    study.runs[0].optimizer_ms = {"p20": float("nan"), "p50": 1.0, "p80": float("inf")}
    store.save(study, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert RunResult("final", "text", "came", 0, 1e-3).bytes_per_parameter is None
