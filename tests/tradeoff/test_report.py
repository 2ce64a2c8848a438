"""The report of a study: which differences count, and what can be read back."""

import json
from dataclasses import replace

import pytest

from came8bit.tradeoff import report, results
from came8bit.tradeoff.config import RunSpec, preset_config
from came8bit.tradeoff.study import Study
from came8bit.tradeoff.train import RunResult


def test_paired_interval_by_hand():
    result = report.paired({0: 1.0, 1: 2.0, 2: 4.0, 9: 0.0}, {0: 0.5, 1: 1.0, 2: 2.5})
    assert result.pairs == 3  # seed 9 has no partner
    assert result.difference == pytest.approx(1.0)
    half = 4.30265273 * 0.5 / 3**0.5
    assert (result.low, result.high) == pytest.approx((1 - half, 1 + half))
    assert result.outside_noise is False
    assert report.paired({0: 1.0}, {1: 1.0}) is None
    assert report.paired({0: 1.0}, {0: 3.0}).outside_noise is None


def test_equality_by_two_one_sided_tests():
    """Equal where the 90 % interval lies inside the margin, which is the same statement."""
    level = {0: 2.0, 1: 2.3, 2: 1.9}
    other = {0: 2.001, 1: 2.303, 2: 1.902}  # differences −0.001, −0.003, −0.002
    half = 2.91998558 * 0.001 / 3**0.5
    assert report.paired(level, other, 0.002 + half + 1e-6).equal
    assert not report.paired(level, other, 0.002 + half - 1e-6).equal
    same = report.paired(level, dict(level))
    assert same.equal
    assert same.outside_noise is False
    assert not report.paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).equal
    assert report.paired({0: 1.0}, {0: 1.0}).equal is False


def study_with(losses):
    """Return a finished study with these losses: optimizer → seed → loss."""
    config = replace(preset_config("quick"), seeds=(0, 1, 2, 3), optimizers=tuple(losses))
    study = Study(config, state="complete")
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            run = RunResult.of(RunSpec("final", config.tasks[0], name, seed, config.rate(name)))
            run.status, run.loss, run.loss_parts = "ok", loss, [loss] * 32
            study.runs.append(run)
    return study


def words_of(losses):
    study = study_with(losses)
    return "\n".join(report.in_words(study, study.config.tasks[0]))


def row_of(words, difference):
    (line,) = (line for line in words.splitlines() if line.startswith(f"| {difference} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_words_tell_noise_from_difference():
    level = {0: 2.0, 1: 2.3, 2: 1.9, 3: 2.1}  # seeds differ by far more than optimizers
    words = words_of(
        {
            "adamw": {seed: loss + 0.05 + 0.001 * seed for seed, loss in level.items()},
            "came": {seed: loss + 0.005 * (-1) ** seed for seed, loss in level.items()},
            "came8bit": level,
        }
    )
    row = row_of(words, "CAME8bit, Nesterov − AdamW")
    assert row[2:5] == ["-0.0515", "-0.0536 to -0.0494", "4"]
    assert row[5] == "**outside the noise**: CAME8bit, Nesterov is better"
    row = row_of(words, "CAME8bit, Nesterov − CAME, Nesterov")
    assert row[2:5] == ["+0.0000", "-0.0092 to +0.0092", "4"]
    assert row[5] == "inside the noise: up to 0.0092 apart"
    close = words_of({"came": {s: x + 1e-5 * s for s, x in level.items()}, "came8bit": level})
    assert "**equal within 0.005**" in row_of(close, "CAME8bit, Nesterov − CAME, Nesterov")[5]


def test_words_are_honest_about_two_seeds_and_one():
    two = {"came": {0: 2.0, 1: 2.1}, "came8bit": {0: 2.01, 1: 2.12}}
    assert "± 9.0 standard deviations" in words_of(two)
    one = {"came": {0: 2.0}, "came8bit": {0: 2.5, 1: 2.1}}
    assert "no interval" in words_of(one)
    assert "nothing to compare" in words_of({"came8bit": {0: 2.5}})
    assert [report.seeds_in_words(n) for n in ([1], [3, 3], [2, 3])] == [
        *("1 seed", "3 seeds", "2 or 3 seeds")
    ]


def test_results_hold_no_nan_and_can_be_read_back(tmp_path):
    study = study_with({"came8bit": {0: 2.5}})
    study.about.data = {"text": {"sha256": "0"}}
    study.runs[0].optimizer_ms = {"p20": float("nan"), "p50": 1.0, "p80": float("inf")}
    with results.Folder(tmp_path) as folder:
        folder.save(study)
        text = (tmp_path / "results.json").read_text()
        assert json.loads(text, parse_constant=lambda word: pytest.fail(word))
        (again,) = folder.read(study)
        assert (again.key, again.loss) == (study.runs[0].key, 2.5)
        study.about.data = {"text": {"sha256": "1"}}
        assert folder.read(study) == []
    assert RunResult("final", "text", "came", 0, 1e-3).bytes_per_parameter is None
