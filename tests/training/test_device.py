"""What makes training fast on a GPU changes no result: late figures, compiled steps, TF32 in training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.training_sample import THREAT, make_images, make_model, make_settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_prune.catalogue import LOSSES
from robust_prune.training import compilation, figures, trainer
from robust_prune.training.reading import reading
from robust_prune.training.trainer import train

# Each makes the host wait until the device has done all that was asked of it.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _run(settings: trainer.TrainSettings, folder: Path, teacher: nn.Module | None = None) -> trainer._Run:
    accelerator = trainer.make_accelerator(settings, "cpu", folder)
    return trainer._Run(
        make_model(), make_images(96), make_images(30, 1), THREAT, settings, 0, accelerator, None, teacher
    )


@pytest.mark.parametrize("loss", LOSSES.names)
def test_a_step_reads_nothing_back_from_the_device(loss: str, tmp_path: Path) -> None:
    settings = make_settings(loss=loss, awp=0.005, awp_warmup=0.0, clip_grad=1.0, distillation=0.5)
    run = _run(settings, tmp_path, make_model(1))
    with _Recorded() as recorded, reading(run.images, [torch.arange(16)], run.device, 0) as ready:
        for x, y in ready:
            run._step(x, y)
    assert "convolution" in recorded.names or "mkldnn_convolution" in recorded.names
    assert not set(recorded.names) & set(WAITS)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES.names)
def test_a_step_on_a_gpu_never_waits_for_it(loss: str, tmp_path: Path) -> None:
    settings = make_settings(loss=loss)
    accelerator = trainer.make_accelerator(settings, "cuda", tmp_path)
    run = trainer._Run(make_model(), make_images(96), make_images(30, 1), THREAT, settings, 0, accelerator, None, None)
    order = torch.arange(16, device="cuda")
    run._step(*run.images.get(order))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with reading(run.images, [order], run.device, 0) as ready:
            for x, y in ready:
                run._step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_figures_that_are_read_late_are_those_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(seconds: float) -> tuple[Any, dict[str, torch.Tensor]]:
        monkeypatch.setattr(figures, "READ_BACK_SECONDS", seconds)
        model = make_model()
        history = train(model, make_images(96), make_images(30, 1), THREAT, make_settings()).history
        return [(r.train_loss, r.train_accuracy, r.val_robust) for r in history], model.state_dict()

    often, late = trained(0.0), trained(1e9)
    assert often[0] == late[0]
    assert all(torch.equal(value, late[1][name]) for name, value in often[1].items())


def test_a_loss_that_is_no_number_is_named_by_its_own_step_however_late_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(figures, "READ_BACK_SECONDS", 1e9)
    plain = trainer._Run._forward_backward

    def breaks(run: trainer._Run, batch: Any) -> Any:
        if (run.state.epoch, run.state.step) == (1, 2):
            with torch.no_grad():
                run.model[0].weight.fill_(float("nan"))
        return plain(run, batch)

    monkeypatch.setattr(trainer._Run, "_forward_backward", breaks)
    model = make_model()
    checkpoint = tmp_path / "checkpoint.pt"
    result = train(model, make_images(96), make_images(30, 1), THREAT, make_settings(), checkpoint=checkpoint)
    assert "loss became nan in epoch 2, step 3." in result.note
    assert result.best_epoch == 1 and all(value.isfinite().all() for value in model.state_dict().values())


def test_training_allows_tf32_unless_single_precision_is_asked_for_and_leaves_the_flags_as_they_were() -> None:
    seen = []
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    class Watched(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x)

    for precision, wanted in (("auto", True), ("fp32", False)):
        seen.clear()
        train(
            Watched(*make_model()),
            make_images(32),
            make_images(30, 1),
            THREAT,
            make_settings(epochs=1, precision=precision),
        )
        assert set(seen) == {(wanted, wanted)}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == kept


class _Uncompilable(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("this code cannot be compiled")
        return super().forward(x)


def test_a_model_that_cannot_be_compiled_trains_all_the_same() -> None:
    plain, asked = make_model(), _Uncompilable(*make_model())
    train(plain, make_images(96), make_images(30, 1), THREAT, make_settings())
    train(asked, make_images(96), make_images(30, 1), THREAT, make_settings(compile="on"))
    assert all(torch.equal(value, asked.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("after", "steps", "expected"), [(0.05, 100, True), (0.2, 100, False), (0.05, 9, False)])
def test_compiling_pays_where_steps_are_faster_and_the_run_is_long(
    monkeypatch: pytest.MonkeyPatch, after: float, steps: int, expected: bool
) -> None:
    model, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    monkeypatch.setattr(compilation, "compiled", lambda model: fast)
    clock = [0.0]
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: clock[0])

    def step(module: nn.Module) -> None:
        clock[0] += after if module is fast else 0.1

    pays = compilation.pays(model, step, torch.device("cpu"), steps=steps, worth_seconds=1.0)
    assert pays == expected


def test_the_same_machine_compiles_the_same_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def pays(*_: object, **__: object) -> bool:
        asked.append(True)
        return len(asked) == 1

    monkeypatch.setattr(compilation, "pays", pays)
    monkeypatch.setattr(compilation, "compiled", lambda model: model)
    for name, loss, timed in (("a", "n_fgsm", 1), ("b", "n_fgsm", 1), ("c", "clean", 2)):
        checkpoint = tmp_path / name
        settings = make_settings(compile="on", loss=loss)
        train(make_model(), make_images(96), make_images(30, 1), THREAT, settings, checkpoint=checkpoint)
        assert len(asked) == timed
        assert torch.load(checkpoint, weights_only=True)["precision"]["compiled"] is (timed == 1)


@pytest.mark.slow
def test_compiled_training_resumes_and_reaches_what_uncompiled_training_reaches(tmp_path: Path) -> None:
    plain, both = make_model(), make_model()
    arguments = (make_images(240), make_images(150, 1), THREAT)
    expected = train(plain, *arguments, make_settings(epochs=4)).history[-1]
    checkpoint = tmp_path / "checkpoint.pt"
    settings = make_settings(epochs=4, compile="on")
    result = train(both, *arguments, settings, checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["precision"]["compiled"]
    # Kernels that add up in another order end at other bits, not at another model.
    assert not all(torch.equal(value, both.state_dict()[name]) for name, value in plain.state_dict().items())
    assert abs(result.history[-1].val_robust - expected.val_robust) < 0.1
    again = train(make_model(), *arguments, settings, checkpoint=checkpoint)
    assert again == result
