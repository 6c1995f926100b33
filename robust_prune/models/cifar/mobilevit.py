"""MobileViT-XS for 32x32 images."""

from __future__ import annotations

from dataclasses import replace

from torch import nn


def mobilevit_xs(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> nn.Module:
    """timm's MobileViT-XS (Mehta and Rastegari, 2022, arXiv 2110.02178) with the first two strides removed.

    The stages then run at 32, 32, 16, 8 and 4 pixels on 32x32 images, so that each attention stage divides into its
    2x2 patches without interpolation. Parameters have the names and, at `width` 1, the shapes of ``timm/mobilevit_xs``.

    Args:
        num_classes: number of logits.
        in_chans: channels of the images.
        width: factor of the convolutional channels; the dimensions of the transformers are not changed.
    """
    from timm.models.byobnet import ByobNet
    from timm.models.mobilevit import model_cfgs

    config = model_cfgs["mobilevit_xs"]
    blocks = list(config.blocks)
    blocks[1] = replace(blocks[1], s=1)
    model = ByobNet(
        replace(config, blocks=tuple(blocks), width_factor=width),
        num_classes=num_classes,
        in_chans=in_chans,
    )
    model.stem.conv.stride = (1, 1)
    return model
