import functools
import json

import pytest

from emadapt import bench


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


def test_the_benchmarks_that_ship() -> None:
    assert set(bench.BENCHMARKS) == {"frechet"}
    assert min(bench.DIMS) == 384
