"""Every image gets the one label that belongs to it, or nothing is paired."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.data.layouts import find_parts
from emadapt.data.pairing import Part
from emadapt.errors import InputError


def touch(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        if path.suffix == ".png":
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
        else:
            path.touch()


def lucchi(root: Path, n: int) -> Path:
    for part in ("Train", "Test"):
        touch(root / f"{part}_In", [f"mask{i:04d}.png" for i in range(n)])
        touch(root / f"{part}_Out", [f"{i}.png" for i in range(n)])
    return root


def numbers(part: Part) -> tuple[list[int], list[int]]:
    """Of images and of labels, by the last digits of their names."""
    assert part.labels is not None
    images, labels = (
        [int(re.findall(r"\d+", file.stem)[-1]) for file in source.files]
        for source in (part.images, part.labels)
    )
    return images, labels


def offsets(part: Part) -> list[int]:
    return [abs(image - label) for image, label in zip(*numbers(part), strict=True)]


def test_lucchi_pairs_by_number_and_lexicographic_gets_it_wrong(tmp_path: Path) -> None:
    lucchi(tmp_path, 165)
    for part in find_parts(tmp_path, "lucchi", "number"):
        assert numbers(part) == (list(range(165)), list(range(165)))
    wrong = find_parts(tmp_path, "lucchi", "lexicographic")[0]
    assert offsets(wrong).count(0) == 2  # as the reference's script
    assert round(np.mean(offsets(wrong))) == 74
    scaled = find_parts(tmp_path, "lucchi", "lexicographic_165")[0]
    assert numbers(scaled) == numbers(wrong), "the rule itself"


@pytest.mark.parametrize("n", [64, 2, 1])
def test_lexicographic_165_mispairs_fewer_slices_as_far_in_shares_of_the_volume(
    tmp_path: Path, n: int
) -> None:
    lucchi(tmp_path, n)
    scaled, plain = (
        find_parts(tmp_path, "lucchi", rule)[0] for rule in ("lexicographic_165", "lexicographic")
    )
    assert numbers(scaled)[0] == list(range(n))
    if n == 64:
        assert np.mean(offsets(scaled)) / 64 == pytest.approx(74 / 165, abs=0.03)
        assert np.mean(offsets(scaled)) > 2.5 * np.mean(offsets(plain))


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=12), st.randoms())
def test_numbers_pair_whatever_the_padding(
    tmp_path_factory: Any, chosen: set[int], random: Any
) -> None:
    root = tmp_path_factory.mktemp("pairs")
    touch(root / "images", [f"slice_{n:0{random.randint(1, 5)}d}.png" for n in chosen])
    touch(root / "labels", [f"{n}.png" for n in chosen])
    (part,) = find_parts(root, "folders", "number")
    assert numbers(part) == (sorted(chosen), sorted(chosen))


NAMES = st.sets(
    st.from_regex(r"[a-c]{0,2}[0-9]{0,3}", fullmatch=True).filter(bool), min_size=1, max_size=6
)


@given(NAMES, NAMES, st.sampled_from(["number", "stem"]))
def test_every_image_gets_the_label_of_its_key_or_nothing_is_paired(
    tmp_path_factory: Any, images: set[str], labels: set[str], rule: str
) -> None:
    """The oracle: what a name says, by itself."""

    def number(name: str) -> Any:
        found = re.findall(r"\d+", name)
        return int(found[-1]) if found else None

    def key(name: str) -> Any:
        return name if rule == "stem" else number(name)

    def read(name: str) -> Any:
        return re.sub(r"\d.*", "", name), number(name)

    root = tmp_path_factory.mktemp("names")
    touch(root / "images", [f"{name}.png" for name in sorted(images)])
    touch(root / "labels", [f"{name}.png" for name in sorted(labels)])
    keys = [[key(name) for name in names] for names in (images, labels)]
    unique = all(None not in k and len(set(k)) == len(k) for k in keys)
    once = all(len(set(map(read, names))) == len(names) for names in (images, labels))
    numbers = [number(name) for name in sorted(images, key=lambda n: (read(n)[0], number(n) or 0))]
    ordered = None in numbers or len(set(numbers)) < len(numbers) or numbers == sorted(numbers)
    good = unique and once and ordered and set(keys[0]) == set(keys[1])
    try:
        (part,) = find_parts(root, "folders", rule)
    except InputError:
        assert not good
        return
    assert good
    assert part.labels is not None
    assert {file.stem for file in part.images.files} == images
    paired = zip(part.images.files, part.labels.files, strict=True)
    assert all(key(image.stem) == key(label.stem) for image, label in paired)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (["1.png", "2.png"], ["1.png"], "2.png has no label"),
        (["1.png"], ["1.png", "2.png"], "label 2.png has no image"),
        (["a1.png", "b1.png"], ["1.png"], "both read as 1"),
        (["1.png", "notes.txt"], ["1.png"], "notes.txt"),
        ([], ["1.png"], "an empty folder"),
    ],
)
def test_anything_unpaired_is_named(
    tmp_path: Path, images: list[str], labels: list[str], words: str
) -> None:
    touch(tmp_path / "images", images)
    touch(tmp_path / "labels", labels)
    with pytest.raises(InputError, match=words):
        find_parts(tmp_path, "folders", "number")


def test_stems_are_in_natural_order_and_missing_folders_named(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        touch(tmp_path / kind, ["b.png", "a10.png", "a9.png"])
    for labelled in (True, False):
        (part,) = find_parts(tmp_path, "folders", "stem", labelled=labelled)
        assert [file.stem for file in part.images.files] == ["a9", "a10", "b"]
        assert (part.labels is not None) == labelled
    for layout, root in (("vnc", tmp_path), ("stack", tmp_path / "nowhere")):
        with pytest.raises(InputError, match="no such folder"):
            find_parts(root, layout, "number")
    (tmp_path / "half/test").mkdir(parents=True)
    with pytest.raises(InputError, match="half/train: found nothing"):
        find_parts(tmp_path / "half", "stack", "number")


@pytest.mark.real_data
def test_the_real_folders_pair_by_number(real_data: Path) -> None:
    train, test = find_parts(real_data / "lucchi", "lucchi", "number")
    (vnc,) = find_parts(real_data / "vnc", "vnc", "number")
    assert (train.depth, test.depth, vnc.depth) == (64, 32, 20)
    assert sum(map(sum, map(offsets, (train, test, vnc)))) == 0
