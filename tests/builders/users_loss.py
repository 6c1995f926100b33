"""A user's file of losses, good ones and bad ones."""

from __future__ import annotations

LOSSES_FILE = '''
from robust_prune.attacks import pgd
from robust_prune.training.losses import LossResult
import torch.nn.functional as F

def margin(model, batch):
    """Logit margin on PGD examples."""
    x_adv = batch.adversarial(lambda m: pgd(m, batch.x, batch.y, batch.threat, steps=2, generator=batch.generator))
    logits = model(x_adv).float()
    own = logits.gather(1, batch.y[:, None])
    rival = logits.scatter(1, batch.y[:, None], float("-inf")).amax(1, keepdim=True)
    accuracy = (logits.argmax(1) == batch.y).float().mean().detach()
    return LossResult(F.softplus(rival - own).mean(), {"accuracy": accuracy}, logits)

def scalar(model, batch):
    return F.cross_entropy(model(batch.x), batch.y)

def wrong(model, batch):
    return model(batch.x)

def broken(model, batch):
    return 1 / 0
'''
