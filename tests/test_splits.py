import math
import re

from hypothesis import assume, given
from hypothesis import strategies as st

from emadapt.data.splits import split_slices
from emadapt.errors import InputError
from emadapt.study.datasets import SplitSettings

SPECS = st.builds(
    SplitSettings, val=st.floats(0.05, 0.5), test=st.floats(0.05, 0.4), gap_nm=st.floats(0, 200)
)


@given(st.integers(1, 300), SPECS, st.floats(4, 60), st.booleans())
def test_blocks_are_disjoint_contiguous_and_apart(
    n: int, spec: SplitSettings, voxel: float, official: bool
) -> None:
    parts = [("train", n), ("test", 7)] if official else [("all", n)]
    try:
        split = split_slices(parts, spec, voxel)
    except InputError:
        assume(False)
        return
    for block in split.values():
        assert block == list(range(block[0], block[-1] + 1))
    gap = split["val"][0] - split["train"][-1] - 1
    assert gap >= (spec.gap_nm > 0)
    assert gap * voxel >= spec.gap_nm
    if official:
        assert split["test"] == list(range(n, n + 7))
        assert split["val"][-1] == n - 1
    else:
        assert split["test"][0] - split["val"][-1] - 1 == gap
        assert split["test"][-1] == n - 1


def test_without_test_part_and_gap_every_slice_trains_or_validates() -> None:
    spec = SplitSettings(val=0.2, gap_nm=0.0).changed(test=0.0)
    split = split_slices([("all", 5)], spec, 500)
    assert split == {"train": [0, 1, 2, 3], "val": [4], "test": []}


@given(st.integers(1, 60), SPECS, st.floats(4, 60))
def test_a_volume_that_is_refused_is_too_thin_and_as_thick_as_said_it_is_not(
    n: int, spec: SplitSettings, voxel: float
) -> None:
    """What the error asks for is enough, but for a slice or so that rounding takes."""
    try:
        split_slices([("all", n)], spec, voxel)
    except InputError as error:
        needed = int(re.findall(r"at least (\d+)", error.expected)[0])
        assert needed > n
        thicker = 2 * needed + 2 * math.ceil(spec.gap_nm / voxel) + 20
        assert all(split_slices([("all", thicker)], spec, voxel).values())


@given(st.integers(6, 200), st.integers(0, 5))
def test_random_covers_every_slice_once_and_repeats_by_seed(n: int, seed: int) -> None:
    spec = SplitSettings(kind="random", seed=seed, gap_nm=0)
    split = split_slices([("all", n)], spec, 50)
    assert sorted(split["train"] + split["val"] + split["test"]) == list(range(n))
    assert split == split_slices([("all", n)], spec, 50)


def test_the_reference_split_of_vnc_is_17_to_3() -> None:
    split = split_slices(
        [("all", 20)], SplitSettings(kind="random", val=0.1, test=0.15, gap_nm=0), 50
    )
    assert (len(split["test"]), len(split["train"]) + len(split["val"])) == (3, 17)
