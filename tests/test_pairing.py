import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.data.layouts import find_parts
from emadapt.errors import InputError


def touch(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / name)


def lucchi(root: Path, n: int) -> None:
    for part in ("Train", "Test"):
        touch(root / f"{part}_In", [f"mask{i:04d}.png" for i in range(n)])
        touch(root / f"{part}_Out", [f"{i}.png" for i in range(n)])


def test_lucchi_pairs_by_number_and_lexicographic_gets_it_wrong(tmp_path: Path) -> None:
    lucchi(tmp_path, 12)
    for part in find_parts(tmp_path, "lucchi", "number"):
        assert [int(i.stem[4:]) for i in part.images.files] == list(range(12))
        assert [int(lab.stem) for lab in part.labels.files] == list(range(12))
    wrong = find_parts(tmp_path, "lucchi", "lexicographic")[0]
    right = sum(
        int(i.stem[4:]) == int(lab.stem)
        for i, lab in zip(wrong.images.files, wrong.labels.files, strict=True)
    )
    assert [lab.stem for lab in wrong.labels.files][:4] == ["0", "1", "10", "11"]
    assert right == 2


def test_lexicographic_pairs_2_of_165_as_the_reference(tmp_path: Path) -> None:
    lucchi(tmp_path, 165)
    part = find_parts(tmp_path, "lucchi", "lexicographic")[0]
    offsets = [
        abs(int(i.stem[4:]) - int(lab.stem))
        for i, lab in zip(part.images.files, part.labels.files, strict=True)
    ]
    assert sum(o == 0 for o in offsets) == 2
    assert round(np.mean(offsets)) == 74


@pytest.mark.parametrize("n", [165, 64, 2, 1])
def test_lexicographic_165_mispairs_fewer_slices_as_far_in_shares_of_the_volume(
    tmp_path: Path, n: int
) -> None:
    lucchi(tmp_path, n)
    part, plain = (
        find_parts(tmp_path, "lucchi", rule)[0] for rule in ("lexicographic_165", "lexicographic")
    )
    assert [int(i.stem[4:]) for i in part.images.files] == list(range(n))
    numbers = [int(lab.stem) for lab in part.labels.files]
    if n == 165:
        assert part.labels.files == plain.labels.files, "the rule itself"
    if n == 64:
        offsets = [abs(i - k) for i, k in enumerate(numbers)]
        assert np.mean(offsets) / 64 == pytest.approx(74 / 165, abs=0.03)
        mild = [abs(i - int(lab.stem)) for i, lab in enumerate(plain.labels.files)]
        assert np.mean(offsets) > 2.5 * np.mean(mild)


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=12), st.randoms())
def test_numbers_pair_whatever_the_padding(tmp_path_factory, numbers: set[int], random) -> None:
    root = tmp_path_factory.mktemp("pairs")
    touch(root / "images", [f"slice_{n:0{random.randint(1, 5)}d}.png" for n in numbers])
    touch(root / "labels", [f"{n}.png" for n in numbers])
    (part,) = find_parts(root, "folders", "number")
    assert [int(lab.stem) for lab in part.labels.files] == sorted(numbers)
    assert [int(i.stem.split("_")[1]) for i in part.images.files] == sorted(numbers)


NAMES = st.sets(
    st.from_regex(r"[a-c]{0,2}[0-9]{0,3}", fullmatch=True).filter(bool).map(lambda n: f"{n}.png"),
    min_size=1,
    max_size=6,
)


@given(NAMES, NAMES, st.sampled_from(["number", "stem"]))
def test_every_image_gets_the_one_label_of_its_key_or_nothing_is_paired(
    tmp_path_factory, images, labels, rule: str
) -> None:
    """The oracle: what a name says, by itself."""

    def key(name: str) -> Any:
        return (
            name[:-4]
            if rule == "stem"
            else int(found[-1])
            if (found := re.findall(r"\d+", name))
            else None
        )

    root = tmp_path_factory.mktemp("names")
    touch(root / "images", sorted(images))
    touch(root / "labels", sorted(labels))
    keys = [[key(n) for n in names] for names in (images, labels)]
    good = all(None not in k and len(set(k)) == len(k) for k in keys) and set(keys[0]) == set(
        keys[1]
    )
    try:
        (part,) = find_parts(root, "folders", rule)
    except InputError:
        assert not good
        return
    assert good
    assert {i.name for i in part.images.files} == images
    assert [key(i.name) for i in part.images.files] == [key(lab.name) for lab in part.labels.files]


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (["1.png", "2.png"], ["1.png"], "2.png has no label"),
        (["1.png"], ["1.png", "2.png"], "label 2.png has no image"),
        (["1.png", "01.png"], ["1.png"], "both read as 1"),
        (["a.png"], ["a.png"], "no number"),
        (["1.png", "notes.txt"], ["1.png"], "notes.txt"),
        ([], ["1.png"], "an empty folder"),
    ],
)
def test_anything_unpaired_is_named(
    tmp_path: Path, images: list[str], labels: list[str], words: str
) -> None:
    touch(tmp_path / "images", [n for n in images if n.endswith("png")])
    for name in images:
        (tmp_path / "images" / name).touch()
    touch(tmp_path / "labels", labels)
    with pytest.raises(InputError, match=words):
        find_parts(tmp_path, "folders", "number")


def test_stems_and_missing_folders(tmp_path: Path) -> None:
    touch(tmp_path / "images", ["b.png", "a10.png", "a9.png"])
    touch(tmp_path / "labels", ["a9.png", "a10.png", "b.png"])
    (part,) = find_parts(tmp_path, "folders", "stem")
    assert (
        [i.stem for i in part.images.files]
        == [lab.stem for lab in part.labels.files]
        == ["a9", "a10", "b"]
    )
    with pytest.raises(InputError, match="no such folder"):
        find_parts(tmp_path, "vnc", "number")
    with pytest.raises(InputError, match="no such folder"):
        find_parts(tmp_path / "nowhere", "stack", "number")


@pytest.mark.real_data
def test_the_real_folders_pair_by_number(real_data: Path) -> None:
    train, test = find_parts(real_data / "lucchi", "lucchi", "number")
    assert (train.depth, test.depth) == (64, 32)
    assert all(
        int(i.stem[4:]) == int(lab.stem)
        for i, lab in zip(train.images.files, train.labels.files, strict=True)
    )
    (vnc,) = find_parts(real_data / "vnc", "vnc", "number")
    assert (
        [i.stem for i in vnc.images.files]
        == [lab.stem for lab in vnc.labels.files]
        == [f"{n:02d}" for n in range(20)]
    )
