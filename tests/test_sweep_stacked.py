"""Heads trained together are the heads that would have been trained alone."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emadapt.models.heads import HEADS
from emadapt.study.study import Study, TrainSettings, Unit
from emadapt.sweep.fit_stacked import Member, fit_stacked, score_stacked
from emadapt.sweep.stacked import Stack, loss_and_gradient, spread
from emadapt.sweep.trial import _fits_a_stack
from emadapt.training.fit import fit, loss_function, score
from emadapt.training.train import prepare
from tiny import make_study, settings

DIM, BLOCKS = 16, 2
RATES, DECAYS, SEEDS = [1e-3, 3e-3, 1e-4], [1e-2, 0.0, 0.1], [0, 1, 2]


def members(**train: object) -> list[TrainSettings]:
    base = dataclasses.replace(TrainSettings(batch=2, precision="fp32"), **train)  # type: ignore[arg-type]
    return [
        dataclasses.replace(base, head_lr=r, weight_decay=d)
        for r, d in zip(RATES, DECAYS, strict=True)
    ]


def batch(generator: torch.Generator, size: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randn(2, DIM * BLOCKS, size // 6, size // 6, generator=generator).half()
    return tokens, (torch.rand(2, size, size + 1, generator=generator) > 0.7).long()


@pytest.mark.parametrize(
    ("name", "groups"), [("linear", 2), ("pyramid", 1), ("pyramid", 2), ("deconv", 1)]
)
def test_a_stack_is_as_many_heads_each_under_torchs_own_adamw(name: str, groups: int) -> None:
    specs, generator = members(), torch.Generator().manual_seed(0)
    stack = Stack(name, DIM, BLOCKS, specs, SEEDS)
    heads = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        heads.append(HEADS[name](DIM, BLOCKS))
    optimisers = [
        torch.optim.AdamW(h.parameters(), s.head_lr, weight_decay=s.weight_decay)
        for h, s in zip(heads, specs, strict=True)
    ]
    loss_of = loss_function("dice_ce")
    for step in range(2 if name == "deconv" else 4):
        small = 12 if name == "deconv" else 30
        batches, factor = [batch(generator, small + 6 * g) for g in range(groups)], (step + 1) / 4
        found = stack.step(batches, factor)
        for k, (head, optimiser, spec) in enumerate(zip(heads, optimisers, specs, strict=True)):
            optimiser.param_groups[0]["lr"] = spec.head_lr * factor
            losses = [
                loss_of(head(list(t.float().split(DIM, 1)), y.shape[-2:]), y[:, None])
                for t, y in batches
            ]
            loss = torch.stack(losses).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), spec.clip)
            optimiser.step()
            optimiser.zero_grad()
            assert float(found[k]) == pytest.approx(loss.item(), abs=1e-5)
    for k, head in enumerate(heads):
        mine = stack.state(k)
        for own, theirs in (
            (mine["params"], head.named_parameters()),
            (mine["buffers"], head.named_buffers()),
        ):
            for key, value in theirs:
                # AdamW's first steps are the gradient's sign: where that is rounding, weights may differ by a learning rate.
                apart = (own[f"head.{key}"] - value).abs()
                assert apart.float().mean().item() < 1e-6, key


@pytest.mark.parametrize("name", ["dice", "dice_ce", "tversky"])
def test_loss_and_gradient_are_monais_and_autograds(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 2, 11, 9, generator=generator, requires_grad=True)  # B,members,2,H,W
    truth = (torch.rand(3, 11, 9, generator=generator) > 0.7).float()
    truth[0] = 0  # an image without foreground
    expected = torch.stack(
        [loss_function(name)(logits[:, k], truth[:, None].long()) for k in range(4)]
    )
    (by_logits,) = torch.autograd.grad(expected.sum(), logits)
    loss, gradient = loss_and_gradient(name, (logits[:, :, 1] - logits[:, :, 0]).detach(), truth)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, by_logits[:, :, 1], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(-gradient, by_logits[:, :, 0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("small", "large"), [(5, 30), (12, 42), (7, 7), (9, 4), (1, 6)])
def test_spread_is_bilinear_interpolation(small: int, large: int) -> None:
    x = torch.randn(2, 3, small, small + 2, generator=torch.Generator().manual_seed(0))
    found = spread(small, large) @ x @ spread(small + 2, large + 1).T
    torch.testing.assert_close(
        found, F.interpolate(x, (large, large + 1), mode="bilinear", align_corners=False)
    )


@pytest.mark.parametrize("name", ["linear", "deconv"])
def test_those_who_stay_do_not_notice_who_leaves(name: str) -> None:
    stacks = [Stack(name, DIM, BLOCKS, members(), SEEDS) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    first, second = [batch(generator, 12)], [batch(generator, 12)]
    for stack in stacks:
        stack.step(first, 1.0)
    stacks[1].keep([0, 2])
    losses = [stack.step(second, 0.5) for stack in stacks]
    torch.testing.assert_close(losses[1], losses[0][[0, 2]])
    for k, row in enumerate([0, 2]):
        for part in ("params", "mean", "square", "buffers"):
            torch.testing.assert_close(
                stacks[1].state(k)[part], stacks[0].state(row)[part], rtol=1e-4, atol=1e-6
            )


# -- whole fits, on the tiny study


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    return make_study(tmp_path, settings(epochs=3, steps_per_epoch=4, precision="fp32"))


UNIT = Unit("t", "frozen", "paired", 0)


def crew(
    study: Study, folder: Path, rates: list[float], on_epoch=lambda metrics, step: None
) -> list[Member]:
    specs = [dataclasses.replace(study.train_settings(UNIT), head_lr=r) for r in rates]
    return [Member(s, 0, folder / str(i), on_epoch) for i, s in enumerate(specs)]


def test_a_stacked_fit_is_the_fits_alone(tiny: Study, tmp_path: Path) -> None:
    rates = [1e-3, 4e-3]
    together = crew(tiny, tmp_path / "stack", rates)
    fit_stacked(prepare(tiny, UNIT), together, 0)
    for member in together:
        inputs = prepare(tiny, UNIT)
        alone = fit(
            inputs,
            member.train,
            UNIT,
            tmp_path / f"alone-{member.train.head_lr}",
            lambda metrics, step: None,
        )
        assert len(alone.history) == len(member.progress.history) == 3
        for mine, its in zip(member.progress.history, alone.history, strict=True):
            assert mine["train/loss"] == pytest.approx(its["train/loss"], abs=2e-4)
            assert mine["val/iou"] == pytest.approx(
                its["val/iou"], abs=0.02
            )  # counts pixels at a threshold
            assert mine["train/lr_head"] == pytest.approx(its["train/lr_head"])
        assert member.progress.best_epoch == alone.best_epoch
        final = score(inputs.segmenter, inputs.volumes, inputs.views, every=0)
        assert member.scored.keys() == final.keys()
        assert member.scored == pytest.approx(final, abs=0.02)


def test_heads_that_share_batch_statistics_are_scored_with_those_of_their_own_best(
    tiny: Study, tmp_path: Path
) -> None:
    study = dataclasses.replace(
        tiny, train=dataclasses.replace(tiny.train, head="linear", monitor="val_loss")
    )
    together = crew(study, tmp_path / "stack", [3.0, 1e-2])
    fit_stacked(prepare(study, UNIT), together, 0)
    assert len({member.progress.best_epoch for member in together}) == 2, (
        "or there is nothing to tell apart"
    )
    inputs = prepare(study, UNIT)
    backbone = inputs.segmenter.backbone
    for n, member in enumerate(together):
        stack = Stack("linear", backbone.arch.dim, len(backbone.blocks), [member.train], [0])
        stack.load(0, member.best, 0)
        assert member.scored == score_stacked(stack, inputs, every=0)[0], n


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"backbones": {"stride": 7}}, False),
        ({"backbones": {"smooth_z_nm": 30.0}}, False),
        ({"backbones": {"flips": True}}, False),
        ({"train": {"average": 0.9}}, False),
        ({"train_sets": {"crops": 2}}, False),
    ],
)
def test_what_only_a_fit_alone_does_is_not_stacked(
    tiny: Study, change: dict[str, dict[str, Any]], fits: bool
) -> None:
    sets = {
        "paired": dataclasses.replace(
            tiny.train_set_settings["paired"], **change.get("train_sets", {})
        )
    }
    backbones = {
        "t": dataclasses.replace(tiny.backbone_settings["t"], **change.get("backbones", {}))
    }
    own = dataclasses.replace(
        tiny,
        train_set_settings=tiny.train_set_settings | sets,
        backbone_settings=backbones,
        train=dataclasses.replace(tiny.train, **change.get("train", {})),
    )
    attempt: Any = SimpleNamespace(config=own, unit=UNIT, train=own.train_settings(UNIT))
    assert _fits_a_stack(attempt) == fits


def test_scores_of_equal_heads_are_equal_but_for_pixels_at_the_threshold(tiny: Study) -> None:
    inputs = prepare(tiny, UNIT)
    stack = Stack(
        "pyramid", inputs.segmenter.backbone.arch.dim, 4, [tiny.train_settings(UNIT)] * 2, [0, 0]
    )
    expected = score(
        inputs.segmenter, inputs.volumes, inputs.views, every=2, loss_of=loss_function("dice_ce")
    )
    for found in score_stacked(stack, inputs, every=2, loss=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found == pytest.approx(
            expected, abs=1e-3
        )  # in which order a processor adds moves single pixels of a random head


def test_a_member_that_diverges_fails_alone(tiny: Study, tmp_path: Path) -> None:
    odd = crew(tiny, tmp_path / "odd", [1e-3, 1e30])
    fit_stacked(prepare(tiny, UNIT), odd, 0)
    assert "the loss is not finite" in str(odd[1].error)
    assert not odd[1].scored
    plain = crew(tiny, tmp_path / "plain", [1e-3])
    fit_stacked(prepare(tiny, UNIT), plain, 0)
    assert odd[0].scored == pytest.approx(plain[0].scored, abs=1e-6)


def test_a_stack_that_is_stopped_goes_on_at_its_checkpoints_in_any_company(
    tiny: Study, tmp_path: Path
) -> None:
    rates = [1e-3, 2e-3, 4e-3]
    undisturbed = crew(tiny, tmp_path / "whole", rates)
    fit_stacked(prepare(tiny, UNIT), undisturbed, 0)

    class Stopped(BaseException):
        pass

    seen = []

    def stop(metrics: dict[str, float], step: int) -> None:
        seen.append(step)
        if len(seen) == 4:  # the first member is an epoch ahead of the others
            raise Stopped

    with pytest.raises(Stopped):
        fit_stacked(prepare(tiny, UNIT), crew(tiny, tmp_path / "half", rates, stop), 0)
    resumed = crew(tiny, tmp_path / "half", rates)
    fit_stacked(prepare(tiny, UNIT), resumed, 0)
    for mine, its in zip(resumed, undisturbed, strict=True):
        first, second = ([h["train/loss"] for h in m.progress.history] for m in (mine, its))
        assert np.allclose(first, second, atol=1e-5)
        assert mine.scored == pytest.approx(its.scored, abs=1e-3)
    assert json.dumps(resumed[0].progress.history)
