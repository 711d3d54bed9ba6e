import functools
import json

import pytest
import torch
from click.testing import CliRunner

from emadapt import bench
from emadapt.cli import main
from emadapt.sweep.bench import stacked_heads_benchmark


def test_structure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = functools.partial(bench.frechet_benchmark, dims=(6, 12), few=4, repeats=1)
    monkeypatch.setattr(bench, "BENCHMARKS", {"frechet": small, "another": lambda: [{"ratio": 2.0}]})
    result = bench.run_benchmarks()
    assert json.loads(json.dumps(result)) == result
    assert {"cpu", "cpus", "threads", "load", "numpy", "scipy"} <= set(result["machine"])
    rows = [row for row in result["frechet"] if row["threads"] == 1]
    assert [(row["dim"], row["form"]) for row in rows] == [(6, "moments"), (12, "moments"), (12, "samples")]
    for row in result["frechet"]:
        assert row["relative_difference"] < 1e-6
        assert row["ratio"] == pytest.approx(row["sqrtm_s"] / row["fast_s"])
    bench.print_benchmarks(result)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("moments", "samples", "another", "ratio"))


def test_names_choose_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"one": lambda: [{"ratio": 1.0}], "two": lambda: [{"ratio": 2.0}]})
    assert list(bench.run_benchmarks(["two"])) == ["machine", "two"]
    assert list(bench.run_benchmarks()) == ["machine", "one", "two"]
    result = CliRunner().invoke(main, ["bench", "three"])
    assert result.exit_code == 2
    assert "error: benchmark 'three': found no such one; expected one, two." in result.output


def test_threads_of_a_row_are_those_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"t": lambda: [{"torch": torch.get_num_threads()}]})
    before = torch.get_num_threads()
    assert all(row["torch"] == row["threads"] for row in bench.run_benchmarks()["t"])
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_stacked_heads_in_small() -> None:
    rows = stacked_heads_benchmark(members=2, epochs=1, steps=1)
    assert [row["head"] for row in rows] == ["linear", "pyramid"]
    for row in rows:
        assert row["members"] == 2
        assert row["ratio"] == pytest.approx(row["stacked_per_hour"] / row["alone_per_hour"])
        assert row["cpu_time_ratio"] > 0


def test_the_benchmarks_that_ship() -> None:
    assert set(bench.BENCHMARKS) == {"frechet", "stacked-heads"}
    assert min(bench.DIMS) == 384
