"""Adversarial training that resumes from its last checkpoint after a kill."""

from __future__ import annotations

import copy
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import distributed
from ..attacks import ThreatModel, kept_buffers, share_of_batch
from ..console import Advance, console, track, working
from ..data.augment import crop_and_flip, draw_moves
from ..data.base import ImageSet, TensorImages, as_floats, plain_strides, stratified
from ..data.crops import ResizedCrops
from ..errors import QualityGateError, UsageError
from ..introspect.copies import copied
from ..introspect.fingerprint import images_hash, models_hash
from ..models import user_file
from ..models.layout import tf32
from ..recipe import TrainSettings
from ..runs.files import digest
from ..serialization import to_json
from ..training import compilation
from .acceleration import divisible, make_accelerator
from .checkpoint import FORMAT as CHECKPOINT_FORMAT
from .checkpoint import RunState, read_checkpoint, write_checkpoint
from .decisions import decided, structure
from .figures import StepFigures
from .losses import Batch, LossResult, make_loss
from .optimizer import make_optimizer, make_schedule
from .perturbation import perturbed_weights
from .placement import frozen_copy, resident
from .precision import Precision, choose_precision
from .randomness import generator_at, seeded_layers
from .reading import default_workers, reading
from .types import EpochRecord, Start, TrainResult
from .validation import Score, chance_note, score

CHECKPOINT_SECONDS = 60.0
# Fast adversarial training can lose all robustness within one epoch ("catastrophic overfitting", Wong et al., 2020).
COLLAPSE = 0.15
LONG_WAIT = 0.2
"""Share of an epoch that is worth a line if it goes by while images are read."""


class LossNotFinite(QualityGateError):
    """Raised for a training loss that is NaN or infinite."""


class _Run:
    """One training run; `train` is the interface."""

    # More than eight parameters: those of `train`.
    def __init__(
        self,
        model: nn.Module,
        train_images: ImageSet,
        validation: ImageSet,
        threat: ThreatModel,
        settings: TrainSettings,
        seed: int,
        accelerator: Accelerator,
        checkpoint: Path | None,
        teacher: nn.Module | None,
    ) -> None:
        from timm.utils import ModelEmaV3

        self.settings, self.threat, self.seed, self.checkpoint = settings, threat, seed, checkpoint
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        begun_from = models_hash(model), images_hash(train_images)
        self.images = resident(train_images, self.device)
        self.validation = resident(stratified(validation, settings.validation_images), self.device)
        self.model = model.to(self.device)
        # All processes have equally many images, so that the mean of their gradients is the gradient of the batch.
        self.batch_size = divisible(min(settings.batch_size, len(self.images)), accelerator.num_processes)
        self.share = slice(accelerator.process_index, None, accelerator.num_processes)
        found = settings.workers
        self.workers = default_workers(accelerator.num_processes) if found is None else found
        self.precision = distributed.broadcast(self._precision())
        self.precision.arrange(model)
        self.loss = make_loss(settings)
        self.teacher = frozen_copy(teacher, self.device, self.precision) if settings.distillation and teacher else None
        self.steps_per_epoch = max(1, len(self.images) // settings.batch_size)
        steps = settings.epochs * self.steps_per_epoch
        optimizer = make_optimizer(model, settings, steps, self.device)
        self.scheduler = make_schedule(optimizer, settings, steps)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        # The trained and the attacked module share weights; DDP or `torch.compile` may wrap them.
        self.trained: nn.Module = self.wrapped
        self.attacked: nn.Module = self.model
        self.figures = StepFigures()
        self.average: nn.Module | None = None
        if settings.ema_decay > 0:
            # Without the ramp, a decay near 1 keeps the averaged weights at chance for most of a short run.
            self.ema = ModelEmaV3(
                copied(model), settings.ema_decay, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0
            )
            self.average = self.ema.module
        self.state = RunState()
        self.history: list[EpochRecord] = []
        self.best_weights = copy.deepcopy(model.state_dict())
        # Trackers and the processes that read images do not change weights.
        described = settings.model_dump(exclude={"trackers", "workers"})
        written = user_file.versions(settings.loss)
        given = [described, written, to_json(threat), seed, *begun_from, len(self.validation)]
        self.key = digest([CHECKPOINT_FORMAT, *given])

    @working("Choosing the fastest precision and memory layout")
    def _precision(self) -> Precision:
        if self.settings.precision == "fp32":
            return Precision(bf16=False, channels_last=False)
        x, _ = self.images.get(torch.arange(self.batch_size // self.accelerator.num_processes))
        return choose_precision(self.model, as_floats(x, self.device))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        value = {
            "key": self.key,
            "state": asdict(self.state) | {"start": list(self.state.start), "best": list(self.state.best)},
            "history": [asdict(record) for record in self.history],
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "precision": asdict(self.precision),
        }
        write_checkpoint(self.checkpoint, value)

    def resume(self) -> bool:
        value = read_checkpoint(self.checkpoint, self.key, self.device)
        if value is None:
            return False
        self.model.load_state_dict(value["model"])
        if self.average is not None:
            self.average.load_state_dict(value["average"])
        self.optimizer.load_state_dict(value["optimizer"])
        self.best_weights = value["best_weights"]
        self.history = [EpochRecord(**record) for record in value["history"]]
        scores = {name: Score(*value["state"][name]) for name in ("start", "best")}
        self.state = RunState(**(value["state"] | scores))
        self.precision = Precision(**value["precision"])
        self.precision.arrange(self.model)
        self._compile_if(self.precision.compiled)
        return True

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        # Evaluation never uses TF32 for verdicts; see `evaluation.scoring`.
        with tf32(self.settings.precision == "auto"):
            return self._run()

    def _run(self) -> TrainResult:
        if not self.resume():
            self.state.start = self._score(self.model)
            self._keep_if_better(0, self.state.start, self.model)
            self.precision = replace(self.precision, compiled=self._compilation_pays())
            self._compile_if(self.precision.compiled)
        settings, state = self.settings, self.state
        total = settings.epochs * self.steps_per_epoch
        done = state.epoch * self.steps_per_epoch + state.step
        with track(f"Training ({settings.loss}, {self.precision})", total, done) as advance:
            while state.epoch < settings.epochs and not state.note:
                try:
                    self._epoch(advance)
                except LossNotFinite as error:
                    # Other processes may have seen finite losses and would wait for this one.
                    if state.best_epoch == 0 or self.accelerator.num_processes > 1:
                        raise
                    state.note = f"{error} Went back to epoch {state.best_epoch}."
                    console.print(state.note, markup=False)
        self.model.load_state_dict(self.best_weights)
        self.save()
        note = state.note or (chance_note(state.best, self.validation) if settings.epochs else "")
        images, steps = len(self.validation), settings.validation_steps
        start = Start(state.start.clean, state.start.robust, images, steps) if images else None
        return TrainResult(tuple(self.history), state.best_epoch, note, start)

    def _epoch(self, advance: Advance) -> None:
        state = self.state
        # Copied once, since a copy in every step would synchronise the host with the previous step.
        order = self._order(state.epoch).to(self._index_device)
        begin = last_save = time.monotonic()
        before = state.elapsed
        batches = [self._indices(order, step) for step in range(state.step, self.steps_per_epoch)]
        with reading(self._images_of(state.epoch), batches, self.device, self.workers) as ready:
            for _ in batches:
                asked = time.monotonic()
                x, y = next(ready)
                state.waited += time.monotonic() - asked
                self._step(x, y)
                state.step += 1
                unfinished = state.step < self.steps_per_epoch
                save = unfinished and time.monotonic() - last_save > CHECKPOINT_SECONDS
                if save or not unfinished or self.figures.due:
                    self._read_figures(advance)
                if save:
                    state.elapsed = before + time.monotonic() - begin
                    self.save()
                    last_save = time.monotonic()
        state.elapsed = before + time.monotonic() - begin
        self._finish_epoch()

    def _images_of(self, epoch: int) -> ImageSet:
        if self.settings.resized_crop is None:
            return self.images
        return ResizedCrops(self.images, self._size, self.settings.resized_crop, self.seed, epoch)

    @cached_property
    def _size(self) -> tuple[int, int]:
        height, width = self.images.get(torch.zeros(1, dtype=torch.int64))[0].shape[-2:]
        return height, width

    def _indices(self, order: Tensor, step: int) -> Tensor:
        """Return the positions of this process's images of a step."""
        start = step * self.settings.batch_size
        return order[start : start + self.batch_size][self.share]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.images), generator=generator_at("cpu", self.seed, "order", epoch))

    def _read_figures(self, advance: Advance) -> None:
        """Accumulate losses and accuracies of the last steps; raise LossNotFinite for a loss that is not finite."""
        state, read = self.state, self.figures.read()
        for step, (loss, accuracy) in enumerate(read, start=state.step - len(read) + 1):
            if not math.isfinite(loss):
                raise LossNotFinite(
                    f"training loss became {loss} in epoch {state.epoch + 1}, step {step}. "
                    "Lower the learning rate, or look for NaN in the model's weights."
                )
            state.loss_sum += loss
            state.accuracy_sum += accuracy
        mean = state.loss_sum / state.step, 100 * state.accuracy_sum / state.step
        seen = ""
        if self.history and (last := self.history[-1]).val_clean is not None and last.val_robust is not None:
            seen = f", held-out {100 * last.val_clean:.1f} / {100 * last.val_robust:.1f} %"
        advance(len(read), note=f"epoch {state.epoch + 1}: loss {mean[0]:.3f}, train {mean[1]:.1f} %{seen}")

    def _step(self, x: Tensor, y: Tensor) -> None:
        """Run one optimizer step without reading any value, which would synchronise host and device."""
        settings, state = self.settings, self.state
        self.scheduler.step_update(self._steps_done)
        awp = settings.awp if self._steps_done >= settings.awp_warmup * settings.epochs * self.steps_per_epoch else 0.0
        generator = generator_at(self.device, self.seed, "step", state.epoch, state.step)
        result = self._gradients_of(x, y, generator, awp)
        if settings.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        self.optimizer.step()
        # Batch-norm statistics of each process are from its own share, so they are averaged.
        distributed.all_reduce_mean([buffer for buffer in self.model.buffers() if buffer.is_floating_point()])
        if self.average is not None:
            self.ema.update(self.model, step=self._steps_done + 1)
        self.figures.queue(result.loss, result.metrics.get("accuracy"))

    def _gradients_of(self, x: Tensor, y: Tensor, generator: torch.Generator, awp: float) -> LossResult:
        """Attack this process's share of a batch and compute the gradients of its loss, in each ``grad``."""
        state, process = self.state, self.accelerator.process_index
        x = self._augmented(x, generator)
        self.trained.train()
        batch = Batch(x, y, self.threat, generator, self.attacked, self.teacher)
        with ExitStack() as stack:
            stack.enter_context(seeded_layers(self.device, self.seed, state.epoch, state.step, process))
            stack.enter_context(share_of_batch(process, self.accelerator.num_processes))
            if awp:
                stack.enter_context(perturbed_weights(self.model, self._gradients(batch), awp))
            return self._forward_backward(batch)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return this process's augmented images of a batch, in [0, 1].

        Crops are drawn for the full batch, so that they do not depend on the number of processes.
        """
        settings = self.settings
        padding = 0 if settings.resized_crop is not None else settings.crop_padding
        if padding or settings.flip:
            moves = draw_moves(self.batch_size, padding, settings.flip, generator)
            x = crop_and_flip(x, moves.of(self.share))
        else:
            x = plain_strides(x)
        return (x.float() / 255).contiguous(memory_format=self.precision.memory_format)

    @property
    def _steps_done(self) -> int:
        return self.state.epoch * self.steps_per_epoch + self.state.step

    def _forward_backward(self, batch: Batch) -> LossResult:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.bf16):
            result = self.loss(self.trained, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(result.loss)
        return result

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Return gradients of the batch at the current weights; batch-norm statistics are not updated."""
        with kept_buffers(self.model):
            self._forward_backward(batch)
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    @working("Trying whether compilation pays")
    def _compilation_pays(self) -> bool:
        wanted = self.settings.compile
        if wanted == "off" or self.accelerator.num_processes > 1 or (wanted == "auto" and self.device.type != "cuda"):
            return False
        generator, indices = generator_at(self.device, self.seed, "compile"), self._indices(self._order(0), 0)
        with reading(self._images_of(0), [indices], self.device, 0) as ready:
            ((x, y),) = ready

        def step(model: nn.Module) -> None:
            self.trained = self.attacked = model
            with kept_buffers(self.model):
                self._gradients_of(x, y, generator, self.settings.awp)

        total = self.settings.epochs * self.steps_per_epoch
        method = [self.settings.loss, self.settings.steps, self.settings.awp, asdict(self.precision), self.batch_size]
        inputs = [structure(self.model), method, total, wanted]
        found = decided(
            "compilation", inputs,
            lambda: {"pays": compilation.pays(self.model, step, self.device, steps=total, always=wanted == "on")},
        )  # fmt: skip
        self.trained, self.attacked = self.wrapped, self.model
        self.optimizer.zero_grad(set_to_none=True)
        return found["pays"]

    def _compile_if(self, wanted: bool) -> None:
        if wanted:
            self.trained = self.attacked = compilation.compiled(self.model)

    @property
    def _index_device(self) -> torch.device:
        return self.device if isinstance(self.images, TensorImages) else torch.device("cpu")

    @working("Held-out accuracy")
    def _score(self, model: nn.Module) -> Score:
        return score(
            model,
            self.validation,
            self.threat,
            steps=self.settings.validation_steps,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )

    def _rank(self, found: Score) -> tuple[float, float]:
        # Untrained weights that name one class for all images have some robust accuracy, clean training ends at 0.
        return (found.clean, found.robust) if self.settings.loss == "clean" else (found.robust, found.clean)

    def _keep_if_better(self, epoch: int, found: Score, model: nn.Module) -> None:
        if self._rank(found) > self._rank(self.state.best) or len(self.validation) == 0:
            self.state.best, self.state.best_epoch = found, epoch
            self.best_weights = copy.deepcopy(model.state_dict())

    def _finish_epoch(self) -> None:
        state = self.state
        epoch = state.epoch + 1
        candidates = {"live": self.model} | ({"average": self.average} if self.average is not None else {})
        scores = {name: self._score(model) for name, model in candidates.items()}
        source = max(scores, key=lambda name: self._rank(scores[name]))
        collapsed = scores["live"].robust < state.best.robust - COLLAPSE
        before = state.best.robust
        self._keep_if_better(epoch, scores[source], candidates[source])
        if collapsed and self.settings.loss == "n_fgsm":
            state.note = (
                f"epoch {epoch}: held-out robust accuracy fell from {100 * before:.1f} to "
                f"{100 * scores['live'].robust:.1f} % (catastrophic overfitting); went back to epoch {state.best_epoch}"
            )
            console.print(state.note, markup=False)
        sums = zip(*distributed.all_gather((state.loss_sum, state.accuracy_sum)), strict=True)
        loss, accuracy = (sum(parts) / len(parts) / self.steps_per_epoch for parts in sums)
        record = EpochRecord(
            epoch=epoch,
            train_loss=loss,
            train_accuracy=None if math.isnan(accuracy) else accuracy,
            val_clean=scores[source].clean if len(self.validation) else None,
            val_robust=scores[source].robust if len(self.validation) else None,
            source=source,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=state.elapsed,
            waited=state.waited,
        )
        self.history.append(record)
        if record.waited > LONG_WAIT * record.seconds and epoch == 1:
            console.print(
                f"{record.waited / record.seconds:.0%} of the first epoch went by while images were read, by "
                f"{self.workers} process{'' if self.workers == 1 else 'es'}: see training.workers, finetune.workers.",
                markup=False,
            )
        # Trackers accept only numbers.
        self.accelerator.log({k: v for k, v in asdict(record).items() if isinstance(v, int | float)}, step=epoch)
        state.epoch, state.step = epoch, 0
        state.loss_sum = state.accuracy_sum = state.elapsed = state.waited = 0.0
        self.save()


# More than eight parameters: what is trained, on what, against what and how; the last four have defaults.
def train(
    model: nn.Module,
    train_images: ImageSet,
    validation: ImageSet,
    threat: ThreatModel,
    settings: TrainSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Train `model` in place and leave it with the weights of the best epoch.

    After each epoch the live and the averaged weights are scored under PGD on held-out training images, and the weights
    with the best robust accuracy are selected, or with the best clean accuracy for the loss ``clean``. With
    `checkpoint` an interrupted run is resumed and ends with the same weights; the file is written every
    `CHECKPOINT_SECONDS` and after every epoch.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K].
        train_images: training images and labels.
        validation: held-out images for selection; without any, the weights of the last epoch are selected.
        threat: norm and radius.
        settings: loss, epochs, learning rate and the other settings of training.
        seed: random seed of order, augmentation and attacks.
        device: ``cpu`` or ``cuda``. Under a distributed launcher all processes call this function; each uses its own
            device and an equal share of every batch (a remainder is dropped) and of the held-out images.
        checkpoint: file to resume from and to save to.
        teacher: the dense model, for distillation; it is copied.

    Returns:
        The history of all epochs and the selected epoch.

    Raises:
        QualityGateError: the loss becomes NaN or infinite in a distributed run, or before an epoch is better than the
            start; otherwise training ends with a note.
        UsageError: there are fewer than two training images, all parameters are frozen, a batch has less than one image
            for each process, the loss is unknown or fails, or distillation has no teacher.
        EnvironmentProblem: the package of a tracker is not installed.
    """
    if len(train_images) < 2:
        raise UsageError(f"training needs at least 2 images, got {len(train_images)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "all parameters of the model are frozen; there is nothing to train. Call requires_grad_(True)."
        )
    accelerator = make_accelerator(settings, device, checkpoint.parent if checkpoint else Path())
    if settings.distillation and teacher is None:
        raise UsageError("distillation needs the dense parent, which only compress has. Set distillation to 0.")
    run = _Run(model, train_images, validation, threat, settings, seed, accelerator, checkpoint, teacher)
    result = run.run()
    if settings.trackers:
        accelerator.end_training()
    return result
