import functools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emadapt import bench, pipeline_bench
from emadapt.cli import main
from emadapt.config import BackboneSpec, RegimeSpec
from emadapt.models import backbones
from emadapt.models import bench as regimes_bench
from emadapt.models.segmenter import Segmenter, build_frozen, build_segmenter
from emadapt.predict import predict_slice
from emadapt.segment import bench as segment_bench
from emadapt.segment.bench import segment_benchmark
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
    assert set(bench.BENCHMARKS) == {
        "start", "stages", "ingest", "tokens", "cache", "augmentation", "prepared", "scores", "growth", "frechet", "regimes",
        "segment", "stacked-heads",
    }  # fmt: skip
    assert min(bench.DIMS) == 384


def test_a_step_of_each_regime_and_of_peft_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where a new one would only cost time: counts and ratios, and that both LoRA loops are the same model."""
    monkeypatch.setattr(regimes_bench, "PATCH", (2, 32, 32))
    monkeypatch.setattr(backbones, "PLAIN_TOKENS", backbones.PLAIN_TOKENS)  # one row sets it
    monkeypatch.setattr(regimes_bench, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    rows = {row["regime"]: row for row in regimes_bench.regimes_benchmark("tiny_dinov2", tile=28, steps=1, repeats=1)}
    assert set(rows) == {"frozen", "lora", "lora_last_k", "dora", "bitfit", "full", "full, checkpointing", "resunet3d",
                         regimes_bench.FUSED, regimes_bench.NAIVE}  # fmt: skip
    assert rows["lora"]["ratio"] == 1
    assert rows[regimes_bench.NAIVE]["trained"] == rows["lora"]["trained"]
    assert rows["frozen"]["share"] == 0 < rows["lora_last_k"]["share"] == rows["lora"]["share"] / 4
    assert rows["full"]["share"] == 1
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_mb"] > 0 for row in rows.values())


def test_segment_beside_the_model_alone_and_monai() -> None:
    [row] = segment_benchmark("tiny_dinov2", tile=28, slices=2, steps=2, repeats=1)
    assert row["tiles"] == 18
    for way in ("model", "monai"):
        assert row[f"of_{way}"] == pytest.approx(row["segment_per_s"] / row[f"{way}_per_s"])
        assert row[f"of_{way}_cpu"] > 0


def test_monai_and_segment_agree() -> None:
    """The same tiles and model; only the weights within a tile differ."""
    segmenter = build_segmenter(BackboneSpec("tiny_dinov2", "random", tile=28, overlap=0.5, precision="fp32"),
                                RegimeSpec("frozen"), "linear", 0).eval()  # fmt: skip
    plane = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(segment_bench._monai(segmenter, plane, 28), predict_slice(segmenter, plane) > 0.5)


@pytest.mark.parametrize("kind", ["lora", "lora_last_k"])
def test_the_benchmark_runs_what_training_runs(kind: str) -> None:
    regime = RegimeSpec(kind, k=1 if kind == "lora_last_k" else 0)  # type: ignore[arg-type]
    images = torch.rand(2, 1, 56, 56)
    logits = regimes_bench._ours("tiny_dinov2", regime, images)[0]()
    spec = BackboneSpec("tiny_dinov2", "random")
    segmenter = Segmenter(spec, regime, "pyramid", 0, build_frozen(spec)).train()
    assert logits.shape == (2, 2, 56, 56)
    torch.testing.assert_close(logits, segmenter(images, (56, 56)), atol=5e-2, rtol=5e-2)  # fp16 cache; bf16 where it is had


@pytest.mark.parametrize(("arch", "tile"), [("tiny_dinov2", 70), ("dinov2_s", 252)])
def test_operations_are_those_that_torch_counts(arch: str, tile: int) -> None:
    """Torch counts the products that are run; of the tiny one's four blocks, too."""
    backbone = build_frozen(BackboneSpec(arch, "random"))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(torch.rand(1, 1, tile, tile))
    assert pipeline_bench.operations(arch, tile) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_the_pipeline_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_bench, "REPEATS", 1)
    rows = pipeline_bench.cache_benchmark("tiny_dinov2", side=128, epochs=1)
    assert [row["head"] for row in rows] == ["linear", "pyramid"]
    assert all(row["loop_over_cache"] == row["loop_s"] / row["cache_s"] for row in rows)
    (row,) = pipeline_bench.tokens_benchmark(["tiny_dinov2"], [70])
    assert 0 < row["share"] < 1
    (row,) = pipeline_bench.ingest_benchmark(8, 128)
    assert row["ratio"] == row["ingest_mb_per_s"] / row["copy_mb_per_s"]
    rows = pipeline_bench.growth_benchmark((8, 16))
    assert rows[0]["time_of_first"] == rows[0]["own_of_first"] == 1 < rows[1]["slices"]
    assert all(0 < row["own_mb"] < row["peak_mb"] for row in rows)
    (row,) = pipeline_bench.stages_benchmark(2)
    assert row["dvc_repro_s"] > row["alone_s"] > 0
    (row,) = pipeline_bench.scores_benchmark(8, 64, 2)
    assert row["difference"] == 0
    assert row["ratio"] == pytest.approx(row["masks_ms"] / row["counts_ms"])
    (row,) = pipeline_bench.augmentation_benchmark(128, 64, 4)
    assert min(row["plain_per_s"], row["augmented_per_s"]) > 0
    assert row["ms_a_crop"] == pytest.approx(1000 / row["augmented_per_s"])
    rows = pipeline_bench.prepared_benchmark(256, 4, 8)
    assert [row["what"] for row in rows] == ["crop", "patch of 4 slices"]
    assert all(row["ratio"] == pytest.approx(row["anew_ms"] / row["kept_ms"]) for row in rows)
    assert "emadapt --help" in [row["command"] for row in pipeline_bench.start_benchmark()]
