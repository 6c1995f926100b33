"""Weights that hide nothing."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """`model` in eval mode with weights and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(noise + 0.5 if parameter.dim() == 1 else (noise - 0.5) * 0.6)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()
