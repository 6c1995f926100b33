"""Batch-norm statistics, estimated anew."""

import copy

import pytest
import torch
from torch import nn

from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.surgery.batchnorm import reestimate_batchnorm


def images(count=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.zeros(count, dtype=torch.long))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten())


def test_batchnorm_statistics_are_the_plain_average_over_batches():
    model, data = normed(), images(512)
    model[1].running_mean.fill_(7.0)
    assert reestimate_batchnorm(model, data, count=512, batch_size=128) == 1
    activations = model[0](data.images.float() / 255)
    assert torch.allclose(model[1].running_mean, activations.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, activations.var((0, 2, 3)), rtol=2e-2)
    assert model[1].num_batches_tracked == 4


def test_batchnorm_leaves_modes_momenta_and_weights():
    model = normed().train()
    model[3].eval()
    weights = copy.deepcopy(dict(model.named_parameters()))
    reestimate_batchnorm(model, images(), batch_size=100)
    assert model[1].momentum == 0.3
    assert [m.training for m in model] == [True, True, True, False, True]
    assert all(torch.equal(weights[k], v) for k, v in model.named_parameters())


def test_batchnorm_small_last_batch_is_left_out():
    model = normed()
    reestimate_batchnorm(model, images(210), batch_size=100)
    assert model[1].num_batches_tracked == 2


def test_batchnorm_keeps_its_statistics_if_an_image_cannot_be_read():
    class Broken(TensorImages):
        def get(self, indices):
            if int(indices.max()) > 150:
                raise OSError("truncated")
            return super().get(indices)

    model, source = normed(), images(200)
    reestimate_batchnorm(model, source, batch_size=100)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(OSError, match="truncated"):
        reestimate_batchnorm(model, Broken(source.images, source.labels), batch_size=50)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_batchnorm_without_layers_or_images():
    assert reestimate_batchnorm(nn.Linear(2, 2), images(0)) == 0
    with pytest.raises(UsageError, match="at least 2 images a batch, got 1 images"):
        reestimate_batchnorm(normed(), images(1))
