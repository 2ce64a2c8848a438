"""What the benchmarks share."""

import threading
import time

import pytest

from benchmarks.harness import append


def test_rows_of_two_programs_stay_apart(tmp_path):
    """One that waits for the other does not write another header, or into its rows."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "rows.csv"
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = threading.Thread(target=append, args=([{"a": 3, "b": "x, y"}], path))
        other.start()
        time.sleep(0.2)
        file.write("a,b\n1,2\n")
    other.join()
    assert path.read_text(encoding="utf-8") == 'a,b\n1,2\n3,"x, y"\n'


def test_a_row_that_was_cut_off_stays_alone(tmp_path):
    path = tmp_path / "rows.csv"
    append([{"a": 1, "b": 2}], path)
    path.write_bytes(path.read_bytes()[:-2])
    append([{"a": 3, "b": 4}], path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,\n3,4\n"


def test_other_columns_are_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    append([{"a": 1}], path)
    append([], path)
    with pytest.raises(SystemExit, match="other columns"):
        append([{"b": 1}], path)
    assert path.read_text(encoding="utf-8") == "a\n1\n"
