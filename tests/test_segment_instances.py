"""Instances against scipy's labels of the whole volume, whatever the blocks."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import center_of_mass, find_objects, gaussian_filter, label
from scipy.spatial import cKDTree

from emadapt.segment.instances import COLUMNS
from emadapt.segment.job import Job
from emadapt.segment.partial import begin
from emadapt.segment.run import PHASES, find_instances
from emadapt.study.datasets import INTERIOR_BOUNDARY

JOB = Job("in", [], (1, 1, 1), (30.0, 5.0, 4.0), ("mask", "instances"), 1, depth=1, rows=1)


def run(
    folder: Path,
    mask: np.ndarray,
    depth: int,
    rows: int,
    least: int = 1,
    classes: tuple[str, ...] = (),
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """The instances of a mask, block by block from the last to the first."""
    folder.mkdir()
    classes = classes or tuple(map(str, range(1, int(mask.max()) + 1))) or JOB.classes
    job = dataclasses.replace(
        JOB, shape=mask.shape, depth=depth, rows=rows, min_voxels=least, classes=classes
    )
    partial = begin(folder, job, overwrite=False)
    for block in partial.blocks:
        partial.array("mask")[block.place] = mask[block.place]

    def each(_: str, phase: str, numbers: list[int]) -> Iterator[int]:
        return (sum(PHASES[phase](partial, number)) for number in reversed(numbers))

    n = find_instances(partial, each, folder / "table.csv")
    with (folder / "table.csv").open() as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(table) == n
    return np.asarray(partial.array("instances")[:]), table


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.8), st.integers(1, 4), st.integers(1, 6))
def test_as_scipy_labels_the_whole_volume(tmp_path_factory, seed, share, depth, rows):
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 8, 3)) < share
    found, table = run(tmp_path_factory.mktemp("run") / "p", mask, depth, rows)
    expected, n = label(mask)
    assert len(table) == n
    pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(expected))  # one to one
    assert found.max(initial=0) == n
    firsts = [np.flatnonzero(found.ravel() == k)[0] for k in range(1, n + 1)]
    assert firsts == sorted(firsts)  # numbered by their first voxels
    boxes = find_objects(found.astype(np.int64))
    for row, box in zip(table, boxes, strict=True):
        k = int(row["id"])
        assert row["voxels"] == (found == k).sum()
        assert row["volume_nm3"] == pytest.approx(row["voxels"] * 600)
        assert [row[f"{a}_min"] for a in "zyx"] == [s.start for s in box]
        assert [row[f"{a}_max"] for a in "zyx"] == [s.stop - 1 for s in box]
        assert [row[a] for a in "zyx"] == pytest.approx(center_of_mass(found == k), abs=1e-3)


def test_a_component_that_winds_through_many_blocks(tmp_path):
    """A spiral meets the same blocks again and again; another one touches it only at an edge."""
    mask = np.zeros((6, 12, 12), bool)
    for z in range(0, 6, 2):
        mask[z, 1:11, 1] = mask[z, 10, 1:11] = True
    mask[1, 10, 10] = mask[3, 1, 1] = True
    mask[5, 0, 2] = True
    found, table = run(tmp_path / "p", mask, 1, 3)
    assert [row["voxels"] for row in table] == [59, 1]
    assert found[5, 0, 2] == 2
    without, table = run(tmp_path / "q", mask, 1, 3, least=2)
    assert [row["voxels"] for row in table] == [59]
    assert np.array_equal(without, np.where(found == 1, 1, 0))
    assert (tmp_path / "p/table.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_objects_of_two_classes_that_touch_are_two(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4, (5, 7, 6)).astype(np.uint8)
    found, table = run(tmp_path / "run", ids, depth=2, rows=3)
    assert (found > 0).tolist() == (ids > 0).tolist()
    for number in (1, 2, 3):
        expected, n = label(ids == number)
        own = np.where(ids == number, found, 0)
        pairs = np.unique(np.stack([expected.ravel(), own.ravel()]), axis=1)
        assert pairs.shape[1] == n + 1  # background, and one number for each object
        assert sum(row["class"] == number for row in table) == n


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(8, 30))
def test_cores_grow_to_the_nearest_whatever_the_blocks(tmp_path_factory, seed, depth, rows):
    rng = np.random.default_rng(seed)
    mask = (gaussian_filter(rng.random((5, 40, 30)), (1, 3, 3)) > 0.49).astype(np.uint8)
    mask[mask > 0] += rng.random(np.count_nonzero(mask)) > 0.02  # few cores, so some are far
    folder, nm = tmp_path_factory.mktemp("run"), JOB.voxel_nm
    found, table = run(folder / "p", mask, depth, rows, classes=INTERIOR_BOUNDARY)
    whole, _ = run(folder / "q", mask, 5, 40, classes=INTERIOR_BOUNDARY)
    assert np.array_equal(found, whole)
    cores, n = label(mask == 1)
    assert len(table) == n
    places = np.argwhere(cores) * nm
    points = np.argwhere(mask) * nm
    away = cKDTree(places).query(points)[0]
    assert np.array_equal(found[mask > 0] > 0, away <= 60.0)
    for row in table:
        own = found == row["id"]
        assert row["voxels"] == np.count_nonzero(own)
        tree = cKDTree(np.argwhere(own & (mask == 1)) * nm)
        assert tree.query(points[own[mask > 0]])[0] == pytest.approx(away[own[mask > 0]])
        assert [row[a] for a in "zyx"] == pytest.approx(center_of_mass(own), abs=1e-3)
