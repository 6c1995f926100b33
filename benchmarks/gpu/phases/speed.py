"""Images per second of our training loop and of the published ones, in fp32 and tuned; `torch.compile` is last."""

from __future__ import annotations

import time

import torch
from plain_loops import PLAIN_STEPS
from sizes import Sizes
from training import COMPILED, speed
from work import Work

from robust_prune.attacks import ThreatModel
from robust_prune.data.sources import load_data
from robust_prune.machine.snapshot import snapshot
from robust_prune.models import registry
from robust_prune.recipe import TrainSettings


def run(work: Work, sizes: Sizes, deadline: float) -> None:
    """Time all loops on images of the embedded sample of CIFAR-10."""
    chosen, data = sizes.speed, load_data("sample")
    spec = registry.make_spec(
        chosen["arch"], num_classes=10, input_size=data.input_size, mean=data.mean, std=data.std
    )  # fmt: skip
    torch.manual_seed(0)
    model = registry.build(spec)
    x, y = data.train.get(torch.arange(chosen["batch"]))
    x, y = x.to(sizes.device).float() / 255, y.to(sizes.device)
    threat = ThreatModel("linf", 8 / 255)
    found = work.result("speed") or {
        "arch": chosen["arch"], "data": data.name,
        "speed": {"batch": chosen["batch"], "steps": chosen["steps"], "losses": {}},
    }  # fmt: skip
    found["environment"] = snapshot()
    found["speed"]["threads"] = torch.get_num_threads()
    losses = found["speed"]["losses"]
    card = found["environment"]["device"]
    for with_compiled in (False, True):
        slowest = 0.0
        for loss in chosen["compiled"] if with_compiled else PLAIN_STEPS:
            known = losses.get(loss, {})
            if known.get("device") == card and (not with_compiled or COMPILED in known["seconds"]):
                continue
            begin = time.monotonic()
            if begin + slowest > deadline:
                work.save("speed", found)
                return
            settings = TrainSettings(loss=loss, steps=chosen["steps"])
            try:
                taken = speed(model, x, y, threat, settings, chosen["rounds"], with_compiled=with_compiled)
            except Exception as error:  # compiler passes and backends raise errors of many kinds
                if not with_compiled:
                    raise
                known["compilation_failed"] = f"{type(error).__name__}: {error}"[:500]
                continue
            losses[loss] = taken | {"device": card}
            slowest = max(slowest, time.monotonic() - begin)
            work.save("speed", found)
    work.save("speed", found, "done")
