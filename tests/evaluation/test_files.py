"""Exported files that compute something else than the model are asked at every iterate of its attacks."""

from __future__ import annotations

import pytest
import torch
from builders.evaluation_sample import THREAT, Tiny, evaluated
from torch import Tensor

from robust_prune.attacks import apgd, frozen_eval, pgd
from robust_prune.attacks.objectives import classify
from robust_prune.data.base import TensorImages
from robust_prune.evaluation.files import FileVerdicts, differs


class File:
    """Computes what `model` computes, on images of few grey levels if asked, and counts about how many it was asked."""

    key = "file"

    def __init__(self, model: Tiny, levels: int = 0) -> None:
        self.model, self.levels, self.asked = model, levels, 0

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        if self.levels:
            images = (images * self.levels).round() / self.levels
        return self.model(images)

    def predict(self, images: Tensor) -> Tensor:
        return classify(self.logits(images))


def test_only_a_file_that_computes_something_else_is_asked_at_every_iterate(
    trained: Tiny, images: TensorImages
) -> None:
    same, other = File(trained), File(trained, levels=64)
    settings = {"steps": 10, "restarts": 2}
    alone = evaluated(trained, images, THREAT, **settings)
    card = evaluated(trained, images, THREAT, **settings, exported={"fp32": same, "int8": other})
    assert (card.clean, card.robust, card.backwards) == (alone.clean, alone.robust, alone.backwards)
    assert same.asked < 5 * len(images) < 10 * len(images) < other.asked
    assert card.exported["fp32"].robust == card.robust
    assert card.exported["int8"].robust.correct <= card.robust.correct


def test_asking_at_every_iterate_finds_more_than_the_models_worst_points(
    trained: Tiny, images: TensorImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust_prune.evaluation.passes.BLACK_BOX_QUERIES", 1)
    files = {f"{levels}": File(trained, levels=levels) for levels in (8, 12, 16, 24)}
    settings = {"steps": 10, "restarts": 2}
    asked = evaluated(trained, images, THREAT, **settings, exported=files)
    monkeypatch.setattr("robust_prune.evaluation.evaluate.differs", lambda *_: False)
    spared = evaluated(trained, images, THREAT, **settings, exported=files)
    left, more = ([card.exported[name].robust.correct for name in files] for card in (asked, spared))
    assert all(a <= b for a, b in zip(left, more, strict=True)) and sum(left) < sum(more), (left, more)
    assert asked.robust == spared.robust


def test_verdicts_belong_to_the_images_that_were_asked_about(trained: Tiny, images: TensorImages) -> None:
    y = images.labels[:12]
    standing = torch.ones(2, 12, dtype=torch.bool)
    standing[1, 3] = False
    verdicts = FileVerdicts([File(trained), File(trained)], y, standing)
    rows = torch.tensor([3, 5, 8])
    grey = torch.full((3, 3, 8, 8), 0.45)
    verdicts.watch(grey, rows)
    right = trained(grey).argmax(1) == y[rows]
    assert verdicts.standing[0, rows].tolist() == right.tolist()
    untouched = [i for i in range(12) if i not in (3, 5, 8)]
    assert verdicts.standing[:, untouched].all() and not verdicts.standing[1, 3]
    part = FileVerdicts([File(trained)], y, torch.ones(1, 12, dtype=torch.bool))
    part.of_rows(torch.tensor([2, 5, 7]))(grey[:1], torch.tensor([1]))
    assert part.standing[0].logical_not().nonzero().flatten().tolist() == ([] if right[1] else [5])


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_watching_sees_every_iterate_at_its_place_and_changes_nothing(
    trained: Tiny, images: TensorImages, attack: object
) -> None:
    x, y = images.images[:30].float() / 255, images.labels[:30]
    with frozen_eval(trained):
        right = trained(x).argmax(1) == y
        x, y = x[right], y[right]
        seen: list[Tensor] = []

        def watch(points: Tensor, rows: Tensor) -> None:
            assert ((points - x[rows]).abs() <= THREAT.epsilon + 1e-6).all(), "not the images' own points"
            seen.append(rows)

        found = [
            attack(
                trained, x, y, THREAT, steps=6, restarts=2, generator=torch.Generator().manual_seed(0), watch=watcher
            )
            for watcher in (None, watch)
        ]
    assert torch.equal(*found)
    if attack is pgd:
        assert [len(rows) for rows in seen] == [len(x)] * 14
    else:
        assert len(torch.cat(seen)) > len(x) and len(seen[-1]) < len(x), "fallen images leave"


def test_rounding_is_no_difference() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    assert not differs(logits, logits + 1e-6) and differs(logits, logits.half().float())
    assert differs(logits, logits * float("nan"))
