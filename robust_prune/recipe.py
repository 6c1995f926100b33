"""Recipes: the one description of a run, read from YAML and checked; unknown keys are refused."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from .catalogue import ALLOCATIONS, CRITERIA, LOSSES, TIERS

if TYPE_CHECKING:
    from .attacks.threat import ThreatModel


def _number(value: Any) -> Any:
    """Lets a recipe say 8/255, as papers do."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _switch(value: Any) -> Any:
    """Takes back what YAML makes of an unquoted on or off."""
    return ("on" if value else "off") if isinstance(value, bool) else value


# Each catalogue stands in its annotation as well, where `recipe_docs` finds the choices.
CriterionName = Annotated[str, AfterValidator(CRITERIA.check), CRITERIA]
AllocationName = Annotated[str, AfterValidator(ALLOCATIONS.check), ALLOCATIONS]
LossName = Annotated[str, AfterValidator(LOSSES.check), LOSSES]
TierName = Annotated[str, AfterValidator(TIERS.check), TIERS]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
"""Loggers that accelerate writes to."""
Count = Annotated[int, Field(ge=1)]
FractionNumber = Annotated[float, BeforeValidator(_number)]
Radius = Annotated[float, Field(ge=0), BeforeValidator(_number)]


class Section(BaseModel):
    """Base of all recipe sections: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataSection(Section):
    """Which images."""

    name: str | None = None
    """cifar10, cifar100, svhn, fashion_mnist, sample (embedded), a folder, or an .npz file."""
    root: str | None = None
    """Where downloaded data sets lie; the user's cache folder by default."""
    validation: int | None = Field(None, ge=1)
    """Training images held out for selection, never trained on; a tenth, at most 1000, by default."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels that images of a folder are brought to; the folder's own default otherwise."""


class ThreatSection(Section):
    """What the attacker may do."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    epsilon: Radius = 8 / 255
    """Radius in units of [0, 1] pixels; fractions such as 8/255 are welcome."""


class ModelSection(Section):
    """Which model, for `train` and for checkpoints that hold only weights."""

    arch: str | None = None
    """timm/<name>, torchvision/<name>, cifar/<name> or path/to/file.py:function."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the constructor."""


class SensitivitySection(Section):
    """How Module Robustness Sensitivity is measured."""

    estimator: Literal["gradient", "boundary", "ascent"] = "boundary"
    """Estimator of MRS: first order, measured at the boundary of the ball, or by ascent (slow, the reference)."""
    images: int = Field(1024, ge=1)
    """Training images in the adversarial set."""
    steps: int = Field(10, ge=1)
    """PGD steps that make the adversarial set."""
    rho: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Relative radius of the weight perturbation."""
    ascent_steps: int = Field(10, ge=1)
    """Steps on the whole set that the estimator `ascent` ends with."""
    aggregation: Literal["sum", "mean", "max", "quadrature"] = "sum"
    """How the modules of a coupled group make the group's value."""


class PruningSection(Section):
    """How much is cut, and how channels are chosen."""

    ratio: FractionNumber = Field(0.5, gt=0, lt=1)
    """Share of `metric` to remove."""
    metric: Literal["macs", "params", "channels", "latency"] = "macs"
    """What the ratio counts. `latency` is that of the exported file on this machine, at the first of `bench.batches`
    and `bench.threads`: candidates are timed until one lands within 5 %."""
    allocation: AllocationName = "mrs"
    """How the budget is spread over groups."""
    criterion: CriterionName = "adversarial_taylor"
    """Score by which the channels of a group are ordered; the lowest go first."""
    round_to: int = Field(8, ge=1)
    """Widths are rounded to multiples of this where the budget allows."""
    mrs_exponent: float = Field(0.25, ge=0, le=1)
    """Exponent on MRS in `mrs` allocation: 1 takes losses at their word, 0 looks at costs alone. With 90 % of the MACs
    removed, 0.25 was better than either on held-out images, and not told apart from 0.5."""
    min_keep: float = Field(0.1, ge=0, lt=1)
    """Smallest share of a group's channels that stays; one channel always does."""
    cuts: int = Field(1, ge=1, le=100)
    """Cuts that the ratio is spread over; before each, sensitivities are measured anew on what the one before left."""
    epochs_between: int = Field(1, ge=0)
    """Fine-tuning epochs between two cuts."""
    compensation: Literal["none", "batchnorm", "least_squares"] = "least_squares"
    """Repair after the cut, without training: `least_squares` solves the layers behind the cut so that their outputs
    stay what they were, `batchnorm` re-estimates statistics."""
    compensation_images: int = Field(512, ge=2)
    """Training images for it; least squares takes each of them clean and attacked."""


class TrainSettings(Section):
    """One adversarial training or fine-tuning run."""

    loss: LossName = "n_fgsm"
    """Training loss."""
    epochs: int = Field(30, ge=0)
    """Passes over the training images."""
    batch_size: int = Field(128, ge=1)
    """Images a step, over all processes."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate (SGD with Nesterov momentum). By default 0.1; in a run of fewer than 600 steps 0.1 times
    sqrt(steps / 600)."""
    warmup: float = Field(0.15, ge=0, lt=1)
    """Share of all steps in which the rate grows linearly to its peak; a cosine then takes it to zero."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(5e-4, ge=0)
    """Of SGD; norms and biases are not decayed."""
    steps: int = Field(10, ge=1)
    """Gradient steps of the inner attack (pgd_at, trades, mart)."""
    beta: float = Field(6.0, ge=0)
    """Weight of the divergence in trades and mart."""
    distillation: float = Field(0.0, ge=0, le=1)
    """Share of the loss that is adversarial distillation from the dense parent (`compress` only)."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions in the distillation."""
    awp: float = Field(0.0, ge=0, lt=1)
    """Adversarial weight perturbation: relative size of the step that weights take uphill before each gradient; 0
    takes none, 0.005 is usual. One forward and backward more."""
    awp_warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps before it begins."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Of the outer cross-entropy only."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Final decay of the weight average, ramped up from 0; 0 keeps no average."""
    clip_grad: float = Field(0.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    crop_padding: int = Field(4, ge=0)
    """Pixels of the random crop."""
    flip: bool = True
    """Random horizontal mirror."""
    validation_images: int = Field(500, ge=0)
    """Held-out images scored after each epoch."""
    validation_steps: int = Field(10, ge=1)
    """PGD steps of that score."""
    precision: Literal["auto", "fp32"] = "auto"
    """`auto` times formats and layouts and takes the fastest, which may differ from run to run; `fp32` is single
    precision in plain layout, so that on one machine the same command gives the same bits."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """`torch.compile` of the model for attack and step: `auto` times it on a GPU where the run is longer than five
    minutes and takes it if it is faster; `on` takes it wherever the model compiles. In one process only."""
    trackers: tuple[Tracker, ...] = ()
    """Where the figures of each epoch are logged as well; the logger's package must be installed."""


class FinetuneSettings(TrainSettings):
    """Adversarial fine-tuning after a cut: the model knows the images' translations already, and time is short."""

    epochs: int = Field(4, ge=0)
    """Passes over the training images."""
    crop_padding: int = Field(0, ge=0)
    """Pixels of the random crop; none by default, since the dense parent has learnt from shifted images and short runs
    do better without (`benchmarks/README.md` has the pilot)."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Final decay of the weight average, ramped up from 0; 0 keeps no average."""


class EvaluationSection(Section):
    """How robust accuracy is measured."""

    tier: TierName = "pgd"
    """Strength of the attack, printed next to every number."""
    steps: int = Field(20, ge=1)
    """PGD steps."""
    restarts: int = Field(2, ge=1)
    """Random restarts of PGD; an image is robust only if it survives all of them."""
    sweep: tuple[Radius, ...] = ()
    """Other radii to measure by PGD on the first 256 images; fractions such as 4/255 are welcome."""
    images: int | None = Field(None, ge=1)
    """Test images; all of them by default."""
    batch_size: int | None = Field(None, ge=1)
    """Images a pass; by default 250, fewer if they are larger than 64x64 pixels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the attacks' gradients: `auto` is bf16 where the hardware is fast at it. What an attack found is always scored
    in fp32."""


class ExportSection(Section):
    """The ONNX file."""

    opset: int = Field(18, ge=18)
    """ONNX operator set version, 18 or newer."""
    precisions: tuple[Literal["fp16", "int8"], ...] = ()
    """Files of the smaller model to write beside the fp32 one; each is scored and timed as well."""
    calibration_images: int = Field(128, ge=9)
    """Training images that int8 takes the ranges of its activations from, and that both are checked on."""


class BenchSection(Section):
    """Latency of the exported files."""

    batches: tuple[Count, ...] = Field((1, 32), min_length=1)
    """Batch sizes."""
    threads: tuple[Count, ...] = Field((1,), min_length=1)
    """Threads of one session."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """ONNX Runtime execution provider; a silent fallback to another is refused."""
    kinds: tuple[Literal["host", "device", "graph"], ...] = Field(("host",), min_length=1)
    """How inputs and outputs travel: arrays, the device's memory, or that with a CUDA graph (on a GPU provider)."""
    seconds: float = Field(20.0, gt=0)
    """Measuring time for each row's set of files."""


class BaselineSection(Section):
    """A network to stand beside the pruned one."""

    kind: Literal["none", "scratch"] = "none"
    """`scratch` trains the architecture that the plan leaves from fresh weights, as `training` says except for its
    length."""
    minutes: float | None = Field(None, gt=0)
    """Time of that training; by default what fine-tuning took."""


Recovery = Literal["quick", "standard", "best"]
RECOVERIES: dict[Recovery, dict[str, Any]] = {
    "quick": {"loss": "n_fgsm", "epochs": 1, "crop_padding": 0, "awp": 0.0, "distillation": 0.0},
    "standard": {"loss": "n_fgsm", "epochs": 4, "crop_padding": 0, "awp": 0.0, "distillation": 0.0},
    "best": {"loss": "pgd_at", "epochs": 12, "crop_padding": 4, "steps": 10, "awp": 0.005, "distillation": 0.0},
}
"""Presets of fine-tuning after the cut: method and length, in place of a recipe's. `benchmarks/results/recovery.md` has
what methods recover in equal time."""


class Recipe(Section):
    """A whole run."""

    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where torch computes."""
    data: DataSection = DataSection()
    threat: ThreatSection = ThreatSection()
    model: ModelSection = ModelSection()
    training: TrainSettings = TrainSettings()
    """Adversarial training from scratch (`train`)."""
    sensitivity: SensitivitySection = SensitivitySection()
    pruning: PruningSection = PruningSection()
    finetune: FinetuneSettings = FinetuneSettings()
    """Adversarial fine-tuning after the cut (`compress`)."""
    baseline: BaselineSection = BaselineSection()
    """A small network from scratch beside the pruned one (`compress`)."""
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    bench: BenchSection = BenchSection()

    @property
    def threat_model(self) -> ThreatModel:
        """What the attacker may do, as attacks take it."""
        from .attacks.threat import ThreatModel

        return ThreatModel(self.threat.norm, self.threat.epsilon)

    def to_yaml(self) -> str:
        """The resolved recipe, every value written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
