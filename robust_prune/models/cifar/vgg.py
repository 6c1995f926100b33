"""VGG-16 with batch norm for small images."""

from __future__ import annotations

from torch import Tensor, nn

LAYERS: tuple[int | None, ...] = (
    *(64, 64, None),
    *(128, 128, None),
    *(256, 256, 256, None),
    *(512, 512, 512, None),
    *(512, 512, 512, None),
)


class Vgg(nn.Module):
    """VGG of thirteen 3x3 convolutions and one linear classifier (Simonyan and Zisserman, 2015, arXiv 1409.1556).

    Args:
        layers: output channels of each convolution; None is a max pooling that halves the resolution.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    def __init__(self, layers: tuple[int | None, ...], num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        inputs = in_chans
        for width in layers:
            if width is None:
                modules.append(nn.MaxPool2d(2))
                continue
            modules += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_chans, H, W] of at least 32x32 pixels."""
        return self.classifier(self.features(x).mean((2, 3)))


def vgg16_bn(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> Vgg:
    """Return VGG-16 with batch norm and 64 to 512 channels times `width`."""
    layers = tuple(None if base is None else max(1, round(base * width)) for base in LAYERS)
    return Vgg(layers, num_classes, in_chans)
