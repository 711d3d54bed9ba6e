"""Windows over blocks of slices against MONAI on the whole volume at once, and against the model alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from emadapt.data.splits import runs_of
from emadapt.models.predict3d import gaussian, predict_block, window_starts
from emadapt.models.segmenter import Segmenter, build_segmenter
from emadapt.study.study import BackboneSettings, RegimeSettings


def a_model(depth: int, tile: int) -> Segmenter:
    spec = BackboneSettings("tiny_dinov2", "random", tile=tile, overlap=0.5, precision="fp32")
    regime = RegimeSettings("resunet3d", patch=(depth, 32, 32), channels=(2, 2, 2, 2, 2))
    segmenter = build_segmenter(spec, regime, "resunet3d", 0)
    with torch.no_grad():
        segmenter(torch.rand(2, 1, depth, 32, 32), (32, 32))  # running statistics of its own
        segmenter.head.after.conv.weight.mul_(20)  # type: ignore[union-attr, operator]
    return segmenter.eval()


def whole(segmenter: Segmenter, image: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return segmenter(
            torch.from_numpy(image / np.float32(255))[None, None], image.shape[1:]
        ).softmax(1)[0, 1]


IMAGE = np.random.default_rng(0).integers(0, 256, (11, 64, 80)).astype(np.uint8)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_streamed_along_z_it_is_monai_on_the_whole_volume(overlap: float) -> None:
    segmenter, window = a_model(4, 32), (4, 32, 32)
    got = dict(predict_block(segmenter, IMAGE, range(11), overlap))
    separable = gaussian((4,))[:, None, None] * gaussian((32, 32))
    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(IMAGE / np.float32(255))[None, None],
            window,
            2,
            lambda x: segmenter(x, (32, 32)).softmax(1)[:, 1:],
            overlap=overlap,
            mode="gaussian",
            roi_weight_map=torch.from_numpy(separable),
        )
    assert sorted(got) == list(range(11))
    np.testing.assert_allclose(
        np.stack([got[z] for z in range(11)]), torch.as_tensor(expected)[0, 0].numpy(), atol=2e-6
    )
    assert np.stack(list(got.values())).std() > 0.01


def test_a_window_that_covers_the_block_is_the_model_alone() -> None:
    segmenter = a_model(11, 80)
    image = np.pad(IMAGE, ((0, 0), (0, 16), (0, 0)), mode="symmetric")
    got = np.stack([p for _, p in predict_block(segmenter, IMAGE, range(11))])
    np.testing.assert_allclose(got, whole(segmenter, image)[:, :64].numpy(), atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_block_thinner_than_the_patch_is_reflected(n: int) -> None:
    segmenter, first = a_model(4, 80), 5
    got = dict(predict_block(segmenter, IMAGE, range(first, first + n)))
    assert list(got) == list(range(first, first + n))
    shown = {1: [5, 5, 5, 5], 2: [5, 5, 6, 6], 3: [5, 6, 7, 7]}[n]
    image = np.pad(IMAGE[shown], ((0, 0), (0, 16), (0, 0)), mode="symmetric")
    at = {1: 1, 2: 1, 3: 0}[n]
    np.testing.assert_allclose(
        np.stack(list(got.values())), whole(segmenter, image)[at : at + n, :64].numpy(), atol=2e-6
    )


def test_other_slices_are_not_looked_at() -> None:
    segmenter = a_model(3, 32)
    other = IMAGE.copy()
    other[[0, 5, 10]] = 255 - other[[0, 5, 10]]
    slices = [1, 2, 3, 4, 6, 7, 8, 9]
    for (z, p), (at, q) in zip(
        predict_block(segmenter, IMAGE, slices),
        predict_block(segmenter, other, slices),
        strict=True,
    ):
        assert z == at
        assert np.array_equal(p, q)
    assert [len(run) for run in runs_of(slices)] == [4, 4]


@pytest.mark.parametrize(
    ("length", "depth", "share"),
    [(11, 4, 0.5), (4, 4, 0.5), (33, 6, 0.2), (7, 6, 0.0), (9, 1, 0.5)],
)
def test_windows_cover_every_slice_and_keep_inside(length: int, depth: int, share: float) -> None:
    starts = window_starts(length, depth, share)
    assert starts == sorted(set(starts))
    assert (starts[0], starts[-1]) == (0, length - depth)
    assert {z for s in starts for z in range(s, s + depth)} == set(range(length))
    assert all(b - a <= max(1, depth * (1 - share)) for a, b in pairwise(starts))


def test_memory_holds_one_row_of_windows() -> None:
    """Slices are read a window's depth at a time, and a slice is given as soon as no later window covers it."""
    segmenter, asked = a_model(4, 32), []

    class Volume:
        shape = IMAGE.shape

        def __getitem__(self, z: int) -> np.ndarray:
            asked.append(int(z))
            return IMAGE[z]

    given = []
    for z, _ in predict_block(segmenter, Volume(), range(11), 0.5):  # type: ignore[arg-type]
        given.append(z)
        assert max(asked) - z <= 4
    assert given == list(range(11))
    assert len(asked) == 4 * len(window_starts(11, 4, 0.5))
