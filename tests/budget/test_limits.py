"""Layers that are kept or cut less than others, by patterns of their names."""

from __future__ import annotations

from typing import Any

import pytest
from builders.plans import analysed
from builders.surgery_models import images

from robust_prune.budget.limits import fits
from robust_prune.budget.plan import make_plan
from robust_prune.errors import UsageError
from robust_prune.models import registry
from robust_prune.recipe import PruningSection

SPEC = registry.make_spec("cifar/resnet20", num_classes=3, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)


def planned(**section: Any) -> dict[str, float]:
    """Kept shares by group of a plan of a small ResNet."""
    model = registry.build(SPEC, pretrained=False).eval()
    analysis = analysed(model, images()[:1], [0.5, 1.0, 0.2])
    plan = make_plan(analysis, PruningSection(**section))
    return {group.name.removeprefix("backbone."): group.keep / group.channels for group in plan.groups}


@pytest.mark.parametrize(
    ("pattern", "layer", "wanted"),
    [
        ("layer4", "backbone.layer4.0.conv1", True),
        ("layer4.0", "backbone.layer4.0.conv1", True),
        ("backbone.layer4.0.conv1", "backbone.layer4.0.conv1", True),
        ("layer?.*.conv1", "backbone.layer4.0.conv1", True),
        ("conv1", "backbone.layer4.0.conv1", True),
        ("layer4", "backbone.sublayer4.0.conv1", False),
        ("layer4", "backbone.layer40.conv1", False),
        ("Layer4", "backbone.layer4.0.conv1", False),
    ],
)
def test_a_pattern_fits_names_their_ends_and_what_is_inside(pattern: str, layer: str, wanted: bool) -> None:
    assert fits(pattern, layer) is wanted


@pytest.mark.parametrize("allocation", ["mrs", "uniform", "global", "rank"])
def test_limited_layers_keep_their_share_and_the_others_pay(allocation: str) -> None:
    free = planned(ratio=0.5, allocation=allocation, round_to=1)
    bound = planned(
        ratio=0.5, allocation=allocation, round_to=1, keep=("layer1.1",), limits={"layer2": 0.2, "layer2.1": 0.1}
    )
    assert bound["layer1.1.conv1"] == 1 and bound["layer2.1.conv1"] >= 0.9
    assert all(share >= 0.8 for name, share in bound.items() if name.startswith("layer2."))
    others = [name for name in bound if not name.startswith(("layer1.1", "layer2."))]
    assert sum(bound[name] for name in others) < sum(free[name] for name in others)


def test_a_limit_on_one_layer_is_one_on_all_that_lose_channels_with_it() -> None:
    # The second convolutions of all blocks of a stage write to the same residual stream.
    assert planned(ratio=0.5)["layer3.0.conv2"] < 1 == planned(ratio=0.5, keep=("layer3.2.conv2",))["layer3.0.conv2"]


def test_what_the_limits_forbid_is_said() -> None:
    with pytest.raises(
        UsageError, match=r"no layer that can be cut fits 'layer9'\. Patterns are names such as backbone"
    ):
        planned(limits={"layer9": 0.5})
    analysis = analysed(registry.build(SPEC, pretrained=False).eval(), images()[:1], [0.5])
    plan = make_plan(analysis, PruningSection(ratio=0.9, keep=("layer1", "layer2", "layer3")))
    assert (
        "every group is at its floor" in plan.note and "Keep fewer layers, allow more in limits, or lower" in plan.note
    )
