"""benchmarks.evidence: rates, claims and Holm's correction, from rows."""

import argparse
import json

import pytest
from scipy import stats

from benchmarks import evidence
from came8bit.cli import tradeoff

FIELDS = ("purpose", "optimizer", "seed", "lr", "status", "loss", "bytes_per_parameter")


def write(folder, name, finals, tunes=()):
    rows = [
        dict(zip(FIELDS, ("tune", arm, seed, lr, "ok", loss, 1), strict=True))
        for arm, lr, losses in tunes
        for seed, loss in enumerate(losses)
    ] + [
        dict(zip(FIELDS, ("final", arm, seed, lr, status, loss, 1), strict=True))
        for arm, lr, losses in finals
        for seed, loss in enumerate(losses)
        for status in ["ok" if loss else "failed"]
    ]
    (folder / f"{name}.json").write_text(json.dumps({"runs": rows}))


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROWS", tmp_path)
    write(
        tmp_path,
        "text-512",
        finals=[
            ("adamw", 1e-3, [2.0, 2.1, 2.2]),
            ("came", 2e-3, [1.9, 2.0, 2.1]),
            ("came8bit", 1e-3, [1.951, 2.050, 2.149]),
            ("came8bit", 2e-3, [1.9001, 2.0, 2.1001]),
            ("came4bit", 2e-3, [1.9, None, 2.1]),
        ],
        tunes=[
            ("adamw", 5e-4, [2.3, 2.3]),
            ("adamw", 1e-3, [2.1, 2.2]),
            ("came", 1e-3, [2.1, 2.1]),
            ("came", 2e-3, [2.0, 2.1]),
        ],
    )
    return evidence.Rows("text-512")


def test_rates_come_from_the_search_of_the_arm_or_its_leader(rows):
    assert rows.rate("adamw") == 1e-3
    assert rows.rate("came8bit") == rows.rate("came") == 2e-3


def test_claims(rows):
    result = rows.compare("came8bit", "adamw", (1e-3, 1e-3))
    gaps = [-0.049, -0.050, -0.051]
    assert result.paired.difference == pytest.approx(-0.05)
    assert result.p_better == pytest.approx(stats.ttest_1samp(gaps, 0, alternative="less").pvalue)
    text = evidence.summary()
    assert "better" in next(line for line in text.splitlines() if "AdamW's lr, 0.001" in line)
    equal = next(line for line in text.splitlines() if "text-512, CAME8bit" in line)
    assert "| equal" in equal
    assert "1 diverged" in text


def test_worse_than_adamw_is_called_so(rows, tmp_path):
    finals = [("adamw", 1e-3, [2.0, 2.1, 2.2]), ("came8bit", 1e-3, [2.05, 2.151, 2.249])]
    write(tmp_path, "vit", finals)
    lines = [line for line in evidence.summary().splitlines() if line.startswith("| vit")]
    assert sum(line.rstrip("| ").endswith(" worse") for line in lines) == 2


def test_a_table_in_part(rows, tmp_path):
    """AdamW's search is done, that of CAME is not; the arm runs at AdamW's learning rate alone."""
    finals = [("adamw", 1e-3, [2.0, 2.1]), ("came8bit", 1e-3, [1.8, 1.95])]
    write(tmp_path, "vit", finals, tunes=[("adamw", 1e-3, [2.1, 2.2])])
    write(tmp_path, "minilm", finals[:1], tunes=[("adamw", 1e-3, [2.1, 2.2])])
    lines = [[cell.strip() for cell in line.split("|")] for line in evidence.summary().splitlines()]
    head = next(i for i, cells in enumerate(lines) if cells[1:2] == ["vit"])
    assert lines[head + 3][3:7] == ["2", "", "", "1.8750 ± 0.1061"]
    assert [c[2] for c in lines[head + 4 :] if c[1:2] == ["vit"]] == ["AdamW's lr, 0.001"]


def test_no_claim_is_made_below_the_null_control(rows, tmp_path):
    base, better = [2.0, 2.1, 2.2], [1.9, 2.0001, 2.0999]
    finals = [("adamw", 1e-3, base), ("came8bit", 1e-3, better), ("came", 1e-3, base)]
    for size, claims in ((0.05, 2), (0.2, 0)):
        moved = [loss + size + seed * 1e-3 for seed, loss in enumerate(base)]
        control = [("came-published", 1e-3, moved), ("came-pytorch", 1e-3, base)]
        write(tmp_path, "vit", [*finals, *control], tunes=[("adamw", 1e-3, [2.0])])
        lines = [line for line in evidence.summary().splitlines() if line.startswith("| vit")]
        assert sum("better" in line for line in lines) == claims
        assert sum("less than the null control" in line for line in lines) == 2 - claims


def test_holm_by_hand():
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evidence.holm([]) == []


def test_the_margin_of_a_squared_error_is_relative(rows, tmp_path):
    assert rows.margin() == 0.005
    write(tmp_path, "ddpm", finals=[("adamw", 1e-3, [0.1, 0.3])])
    assert evidence.Rows("ddpm").margin() == pytest.approx(0.02 * 0.2)


def test_every_table_is_a_command_line_of_the_study():
    parser = argparse.ArgumentParser()
    tradeoff.add_parser(parser.add_subparsers())
    for name in evidence.TABLES:
        config = tradeoff.study_config(parser.parse_args(evidence.arguments(name, adamw=1e-3)))
        assert config.optimizers[0] == "adamw"
