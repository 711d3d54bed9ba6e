import dataclasses
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.errors import InputError
from emadapt.models import tokens
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.device import resolve_precision
from emadapt.models.tokens import Entry, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study
from tiny import TINY, blobs, build_backbone, make_study, settings, write_stack

pytestmark = pytest.mark.usefixtures("tracking_off")

SPEC = BackboneSettings(**TINY | {"blocks": (2, 4), "views": 2})


@pytest.fixture
def study(tmp_path: Path) -> Study:
    params = settings()
    params["backbones"]["t"] |= {"precision": "fp32", "blocks": [2, 4], "tile": 56}
    return make_study(tmp_path, params)


@pytest.fixture
def volume(study: Study) -> Volume:
    """Ten slices of 90 x 100; train 0-4, val 6, test 8 and 9."""
    return open_volume("a")


@pytest.fixture
def backbone() -> Backbone:
    return pretrained(SPEC)


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("the backbone ran again")


def close_to_fp16(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a.astype(np.float32), b, rtol=2e-3, atol=2e-3)


def entries() -> list[str]:
    """What lies in the cache besides locks."""
    return sorted(p.name for p in Path("scratch/tokens").iterdir() if p.suffix != ".lock")


# ---------------------------------------------------------------- what an entry holds


def test_cached_tokens_are_those_of_the_backbone_in_the_loop(
    backbone: Backbone, volume: Volume
) -> None:
    [view] = token_views(backbone, SPEC, volume, range(1))
    assert view.tokens.dtype == np.float16
    for (z, y, x), cached, label in zip(view.index, view.tokens, view.labels, strict=True):
        tile = torch.from_numpy(volume.image[z, y : y + 56, x : x + 56].astype(np.float32) / 255)
        with torch.inference_mode():
            online = torch.cat(backbone(tile[None, None]), 1)[0]
        assert cached.shape == online.shape == (2 * 64, 4, 4)
        close_to_fp16(cached, online.numpy())
        np.testing.assert_array_equal(label, volume.label[z, y : y + 56, x : x + 56])


@pytest.mark.parametrize("cut", [0, 2, 3])
def test_an_entry_that_ends_at_a_cut_holds_what_enters_the_next_block(
    backbone: Backbone, volume: Volume, cut: int
) -> None:
    """Against hooks on timm's own forward, for plain tiles."""
    entered: list[torch.Tensor] = []
    for view in token_views(backbone, SPEC, volume, range(1), cut=cut):
        assert view.entering is not None
        assert view.entering.dtype == np.float16
        assert view.tokens.shape == (len(view.index), 64 * (cut == 3), 4, 4)
        tiles = [volume.image[z, y : y + 56, x : x + 56] for z, y, x in view.index]
        shown = torch.from_numpy(np.stack(tiles)).float()[:, None] / 255
        handle = backbone.vit.blocks[cut].register_forward_pre_hook(
            lambda _, given: entered.append(given[0])
        )
        with torch.inference_mode():
            [below, _] = backbone(shown)
        handle.remove()
        close_to_fp16(view.entering, entered.pop().numpy())
        if cut == 3:
            close_to_fp16(view.tokens, below.numpy())


@pytest.mark.parametrize("cut", [None, 3])
def test_other_labels_on_the_same_images_take_the_tokens_that_are_there(
    backbone: Backbone, study: Study, monkeypatch: pytest.MonkeyPatch, cut: int | None
) -> None:
    """And the same bytes as where the backbone runs; other images, with the same labels, do not."""
    first = token_views(backbone, SPEC, open_volume("a"), range(2), cut=cut)
    image, label = blobs((10, 90, 100), 0)
    shutil.rmtree("data/a")
    write_stack(Path("data/a"), image, np.roll(label, 9, axis=1))
    ingest(study, "a", Path("data"), Path("build/ingest"))
    alone = token_views(backbone, SPEC, open_volume("a"), range(2), Path("scratch/other"), cut=cut)
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "_computed", never)
        second = token_views(backbone, SPEC, open_volume("a"), range(2), cut=cut)
    for mine, fresh, before in zip(second, alone, first, strict=True):
        for name in ("tokens", "labels", "index", "entering"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(fresh, name))
        assert not np.array_equal(mine.labels, before.labels)
    shutil.rmtree("data/a")
    write_stack(Path("data/a"), 255 - image, label)
    ingest(study, "a", Path("data"), Path("build/ingest"))
    monkeypatch.setattr(tokens, "_computed", lambda *_: (_ for _ in ()).throw(RuntimeError("ran")))
    with pytest.raises(RuntimeError, match="ran"):
        token_views(backbone, SPEC, open_volume("a"), range(1), cut=cut)


def test_the_plain_view_holds_every_split_whole_and_overlaps_where_it_is_predicted(
    backbone: Backbone, volume: Volume
) -> None:
    [view] = token_views(backbone, SPEC, volume, range(1))
    assert set(view.index[:, 0].tolist()) == {z for part in volume.split.values() for z in part}
    seen = np.zeros(volume.image.shape, int)
    for z, y, x in view.index:
        seen[z, y : y + 56, x : x + 56] += 1
    for part, slices in volume.split.items():
        assert (seen[slices] > 0).all()
        rows = view.rows_of(part)
        assert set(view.index[rows, 0].tolist()) == set(slices)
        assert sorted(np.concatenate([view.rows_of_slice(z) for z in slices])) == sorted(rows)
        assert len(rows) / len(slices) == (4 if part == "train" else 6)
    # A row belongs to one part.
    assert sum(len(view.rows_of(part)) for part in volume.split) == len(view.index)


def test_augmented_views_show_training_slices_only_each_view_another_crop(
    backbone: Backbone, volume: Volume
) -> None:
    views = token_views(backbone, SPEC, volume, range(3))
    for view in views[1:]:
        assert set(view.index[:, 0].tolist()) == set(volume.split["train"])
        assert (view.index[:, 1:] == -1).all()
        assert len(view.rows_of("val")) == len(view.rows_of("test")) == 0
        assert set(np.unique(view.labels)) <= {0, 1}
    rows = [row.tobytes() for view in views for row in view.tokens]
    assert len(set(rows)) == len(rows)


def test_labels_of_augmented_views_lie_on_their_tokens(
    backbone: Backbone, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone that only averages each patch, on an image that is its own label."""
    label = np.zeros((10, 90, 100), np.uint8)
    label[:, 20:50, 10:70], label[:, 60:80, 60:75] = 1, 1
    shown = Volume("a", 60 + 120 * label, label, open_volume("a").manifest)
    pooled = torch.nn.AvgPool2d(14)
    monkeypatch.setattr(
        tokens, "compute_tokens", lambda _, images, __: [pooled(images).expand(-1, 64, -1, -1)] * 2
    )
    compared = 0
    for view in token_views(backbone, SPEC, shown, range(3)):
        cells = pooled(torch.from_numpy(np.array(view.labels)).float()[:, None])[:, 0].numpy()
        for cached, expected in zip(view.tokens[:, 0].astype(np.float32), cells, strict=True):
            if expected.std() > 0.1:
                compared += 1
                assert np.corrcoef(cached.ravel(), expected.ravel())[0, 1] > 0.98
    assert compared > 50


def test_tokens_that_are_not_finite_stop_it_and_nothing_stays(
    backbone: Backbone, volume: Volume
) -> None:
    with torch.no_grad():
        backbone.vit.blocks[3].mlp.fc2.bias[5] = torch.nan
    with pytest.raises(InputError, match=r"tokens of a, slice 0: found values that are not finite"):
        token_views(backbone, SPEC, volume, range(1))
    assert entries() == []
    with torch.no_grad():  # finite in fp32, not in fp16
        backbone.vit.blocks[3].mlp.fc2.bias[5] = 0
        backbone.vit.norm.weight.fill_(1e6)
    with pytest.raises(InputError, match="not finite"):
        token_views(backbone, SPEC, volume, range(1))
    assert entries() == []


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": (1, 4)},
        {"blocks": (2, 3)},
        {"scale": 2.0},
        {"longest_edge": 98},
        {"tile": 70},
        {"tile": 0},
        {"overlap": 0.5},
        {"normalisation": "imagenet"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_each_setting_that_changes_tokens_changes_the_key(
    volume: Volume, change: dict[str, Any]
) -> None:
    other = SPEC.changed(**change)
    assert (
        Entry(pretrained(other), other, volume, 0).key
        != Entry(pretrained(SPEC), SPEC, volume, 0).key
    )


def test_weights_view_and_cut_change_the_key(
    backbone: Backbone, volume: Volume, tmp_path: Path
) -> None:
    cuts = (None, 0, 1, 2, 3)
    keys = [Entry(backbone, SPEC, volume, view, cut).key for view in range(3) for cut in cuts]
    keys.append(
        Entry(build_backbone("tiny_dinov2", "random", blocks=(2, 4), seed=1), SPEC, volume, 0).key
    )
    for n in (1, 2):  # a file that is overwritten with other weights keeps its name
        state = build_backbone("tiny_dinov2", "random", seed=n).vit.state_dict()
        torch.save(state, tmp_path / "weights.pt")
        spec = SPEC.changed(source="file", file=str(tmp_path / "weights.pt"))
        keys.append(Entry(pretrained(spec), spec, volume, 0).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("what", ["image", "label", "split"])
def test_data_change_the_key(study: Study, backbone: Backbone, tmp_path: Path, what: str) -> None:
    before = Entry(backbone, SPEC, open_volume("a"), 0).key
    ingest(study, "a")
    assert Entry(backbone, SPEC, open_volume("a"), 0).key == before  # the same data again
    if what == "split":
        study = dataclasses.replace(study, split=study.split.changed(gap_nm=60.0))
    else:
        path = tmp_path / "data/a" / f"{what}.tif"
        array = tifffile.imread(path)
        array[3, 50, 50] = 1 - array[3, 50, 50] if what == "label" else 255 - array[3, 50, 50]
        tifffile.imwrite(path, array, photometric="minisblack")
    ingest(study, "a")
    assert Entry(backbone, SPEC, open_volume("a"), 0).key != before


def test_what_changes_no_token_changes_no_key(backbone: Backbone, volume: Volume) -> None:
    before = [Entry(backbone, SPEC, volume, view).key for view in range(2)]
    changes: tuple[dict[str, Any], ...] = (
        {"views": 7},
        {"source": "hub"},
        {"source": "file", "file": "/elsewhere/weights.pt"},
    )
    for change in changes:
        other = SPEC.changed(**change)
        assert [Entry(backbone, other, volume, view).key for view in range(2)] == before
    wider = SPEC.changed(overlap=0.5)  # crops have no overlap
    assert Entry(backbone, wider, volume, 1).key == before[1]
    auto = SPEC.changed(precision="auto")
    named = {p: Entry(backbone, SPEC.changed(precision=p), volume, 0).key for p in ("bf16", "fp32")}
    assert Entry(backbone, auto, volume, 0).key == named[resolve_precision("auto")]


# ---------------------------------------------------------------- computed once, whole or not at
# all


def test_what_was_killed_in_the_middle_is_never_read_and_gone_on_with(
    backbone: Backbone, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_TOKENS", 64)  # four tiles at once
    seen: list[int] = []
    real = tokens.compute_tokens

    def counted(*args: Any) -> list[torch.Tensor]:
        seen.append(len(args[1]))
        return real(*args)

    def dies(*args: Any) -> list[torch.Tensor]:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "compute_tokens", dies)
        with pytest.raises(KeyboardInterrupt):
            token_views(backbone, SPEC, volume, range(1))
    key = Entry(backbone, SPEC, volume, 0).key
    assert key not in entries()
    monkeypatch.setattr(tokens, "compute_tokens", counted)
    [view] = token_views(backbone, SPEC, volume, range(1))
    assert entries() == [key]  # the half-written one is gone
    assert len(view.tokens) <= sum(seen) < len(view.tokens) + 12  # a slice at most came twice
    shutil.rmtree("scratch/tokens")
    [undisturbed] = token_views(backbone, SPEC, volume, range(1))
    np.testing.assert_array_equal(view.tokens, undisturbed.tokens)


def zeros(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size // 4))


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [zeros, truncated, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "manifest.json"])
def test_a_damaged_entry_is_made_again_and_said(
    backbone: Backbone,
    volume: Volume,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    name: str,
) -> None:
    [view] = token_views(backbone, SPEC, volume, range(1))
    first = {part: np.array(getattr(view, part)) for part in ("tokens", "labels", "index")}
    capsys.readouterr()
    damage(Path("scratch/tokens", *entries(), name))
    [again] = token_views(backbone, SPEC, volume, range(1))
    assert "damaged" in capsys.readouterr().out
    for part, values in first.items():
        np.testing.assert_array_equal(getattr(again, part), values)


def test_two_processes_that_want_one_entry_compute_it_once(
    backbone: Backbone, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first computes; it waits, then reads."""
    real, fork, others = tokens._extract, multiprocessing.get_context("fork"), []
    here, there = fork.Pipe(duplex=False)

    def other() -> None:
        monkeypatch.setattr(tokens, "_extract", never)
        there.send("ready")
        there.send(token_views(backbone, SPEC, volume, range(1))[0].tokens.tobytes())

    def extract(*args: Any) -> None:
        process = fork.Process(target=other)
        others.append(process)
        process.start()
        assert here.recv() == "ready"
        assert not here.poll(0.5)  # it waits
        real(*args)

    monkeypatch.setattr(tokens, "_extract", extract)
    [view] = token_views(backbone, SPEC, volume, range(1))
    assert here.poll(30)
    assert here.recv() == view.tokens.tobytes()
    [process] = others
    process.join(30)
    assert process.exitcode == 0
    assert len(entries()) == 1


# ---------------------------------------------------------------- the stage's files


def test_a_rerun_writes_the_same_manifest(study: Study) -> None:
    path = tokens.run(study, "t", "a")
    first = path.read_bytes()
    tokens.run(study, "t", "a")  # from the cache
    assert path.read_bytes() == first
    shutil.rmtree("scratch/tokens")
    tokens.run(study, "t", "a")  # computed again
    assert path.read_bytes() == first
    spec, volume = study.backbone_settings["t"], open_volume("a")
    keys = [Entry(pretrained(spec), spec, volume, view).key for view in (0, 1)]
    assert [entry["key"] for entry in json.loads(first)["entries"]] == keys
