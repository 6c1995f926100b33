"""Recipes: the complete settings of a run, read from YAML and validated; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from . import radius
from .catalogue import ALLOCATIONS, CRITERIA, LOSSES, TIERS

if TYPE_CHECKING:
    from .attacks.threat import ThreatModel


def _refuse(key: tuple[str, ...], norm: str, radii: tuple[float, ...]) -> None:
    problem = next(filter(None, (radius.refusal(norm, value) for value in radii)), "")
    if problem:
        raise PydanticCustomError("refused", "{problem}", {"key": key, "problem": problem})


def _unusable(value: Any) -> str:
    """Return why files, numbers of 64 bits or terminals cannot take a value, as the end of a sentence, or nothing."""
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            return f"must have at most {LONGEST_TEXT:,} characters, got {len(value):,}"
        if not all(letter.isprintable() for letter in value):
            return f"must be one line of printable characters, got {value[:80]!a}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"must be at most {LARGEST:,}, got {float(value):.3g}"
    if isinstance(value, dict):
        return next(filter(None, map(_unusable, (*value, *value.values()))), "")
    return next(filter(None, map(_unusable, value)), "") if isinstance(value, list | tuple) else ""


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types of which an annotation consists."""
    parts = get_args(annotation)
    yield from chain.from_iterable(map(_leaves, parts)) if parts else (annotation,)


def _switch(value: Any) -> Any:
    """Convert the booleans that YAML makes of unquoted on and off back to text."""
    return ("on" if value else "off") if isinstance(value, bool) else value


# Each catalogue stands in its annotation as well, where `recipe_docs` finds the choices.
CriterionName = Annotated[str, AfterValidator(CRITERIA.check), CRITERIA]
AllocationName = Annotated[str, AfterValidator(ALLOCATIONS.check), ALLOCATIONS]
LossName = Annotated[str, AfterValidator(LOSSES.check), LOSSES]
TierName = Annotated[str, AfterValidator(TIERS.check), TIERS]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
"""Experiment trackers that accelerate supports."""
Count = Annotated[int, Field(ge=1)]
FractionNumber = Annotated[float, BeforeValidator(radius.number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(radius.number)]
Radius = Annotated[float, Field(ge=0), BeforeValidator(radius.number)]
LONGEST_TEXT, LARGEST = 4096, 2**32 - 1
"""Characters of a text, and size of a whole number: the largest seed that all random generators take."""


class Section(BaseModel):
    """Base class of recipe sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and {int, float} & set(_leaves(field.annotation)):
                problem = f"must be a number, got {'true' if value else 'false'}"
                raise PydanticCustomError("refused", "{problem}", {"key": (name,), "problem": problem})
        return values

    @model_validator(mode="after")
    def _values_can_be_used(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if not isinstance(value, Section) and (problem := _unusable(value)):
                raise PydanticCustomError("refused", "{problem}", {"key": (name,), "problem": problem})
        return self


class DataSection(Section):
    """Data set."""

    name: str | None = None
    """cifar10, cifar100, svhn, fashion_mnist, sample (embedded), a folder, or an .npz or .parquet file."""
    root: str | None = None
    """Folder of downloaded data sets; the user's cache folder by default."""
    validation: int | None = Field(None, ge=1)
    """Number of training images held out for model selection and never used for training; a tenth, at most 1000, by
    default."""
    image_size: int | None = Field(None, ge=1, le=4096)
    """Height and width in pixels to which images of a folder or of Hugging Face data are resized; their common size, or
    224, by default. Grey images stay grey."""
    crop_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sides of the centre crop that is kept of these images before they are resized. 0.875 is usual for
    ImageNet: 224 of 256 pixels."""
    class_order: Literal["text", "natural"] = "text"
    """Order in which class folders are numbered: by name as text (1, 10, 2), as by torchvision, or with numbers
    compared as numbers (1, 2, 10), as by timm."""


class ThreatSection(Section):
    """Threat model."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    epsilon: Radius = 8 / 255
    """Radius in units of the [0, 1] pixel range, at most 1 for `linf`; fractions such as 8/255 are allowed. `l2` needs
    a radius of its own."""

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        # Without a norm of its own the section takes that of the model, which `with_threat_of` knows.
        if "norm" in self.model_fields_set:
            _refuse(("epsilon",), self.norm, (self.epsilon,))
        return self


class ModelSection(Section):
    """Model of `train`, and of checkpoints that contain only weights."""

    arch: str | None = None
    """timm/<name>, torchvision/<name>, cifar/<name> or path/to/file.py:function."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the constructor."""
    normalization: str = "auto"
    """Normalization that weights were trained with: none (the network takes [0, 1] images or normalizes itself), data
    (mean and deviation of the data set), imagenet, or MEAN/STD such as 0.5/0.5. `auto` takes that of the checkpoint or
    of the published configuration, or measures on training images which one fits; for `train` it is `data`."""


class SensitivitySection(Section):
    """Measurement of Module Robustness Sensitivity (MRS)."""

    estimator: Literal["gradient", "boundary", "ascent"] = "boundary"
    """Estimator of MRS: first order (`gradient`), the loss at the boundary of the ball after a search on few images
    (`boundary`), or projected gradient ascent (`ascent`, slow, the reference)."""
    images: int = Field(1024, ge=1)
    """Number of training images in the adversarial set."""
    steps: int = Field(10, ge=1)
    """Number of PGD steps for the adversarial set."""
    rho: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Radius of the weight perturbation relative to the norm of the weights."""
    ascent_steps: int = Field(10, ge=1)
    """Largest number of ascent steps on the full adversarial set at the end of the estimator `ascent`."""
    aggregation: Literal["sum", "mean", "max", "quadrature"] = "sum"
    """Aggregation of MRS over the layers of a coupled group."""


class PruningSection(Section):
    """Amount of pruning, and selection of channels."""

    ratio: FractionNumber = Field(0.5, gt=0, lt=1)
    """Share of `metric` to remove, in (0, 1)."""
    metric: Literal["macs", "params", "channels", "latency"] = "macs"
    """Cost to which the ratio refers. `latency` is that of the exported file on this machine, at the first value of
    `bench.batches` and the first value of `bench.threads`; candidates are timed until one is within 5 % of it."""
    allocation: AllocationName = "mrs"
    """Allocation of the budget over groups."""
    criterion: CriterionName = "adversarial_taylor"
    """Criterion that ranks the channels of a group; those with the lowest scores are removed first."""
    round_to: int = Field(8, ge=1)
    """Number to whose multiples widths are rounded where the budget allows."""
    mrs_exponent: float = Field(0.25, ge=0, le=1)
    """Exponent of MRS in the allocation `mrs`: 1 uses MRS in nats, 0 ignores MRS. With 90 % of the MACs removed, 0.25
    was better than 1 on held-out images, and could not be distinguished from 0 and 0.5."""
    min_keep: float = Field(0.1, ge=0, lt=1)
    """Smallest share of a group's channels to keep, at least one channel; branches that go whole keep none."""
    keep: tuple[str, ...] = ()
    """Layers that keep all channels, by name or pattern: `layer4`, `layer?.*.conv1`. Layers that lose channels together
    with them keep theirs."""
    limits: dict[str, Share] = Field(default_factory=dict)
    """Largest share of its channels that a layer may lose, by name or pattern: `{layer4: 0.8}`."""
    branches: bool = True
    """Whether the allocation `cuts` may remove residual branches whole."""
    cuts: int = Field(1, ge=1, le=100)
    """Number of cuts over which the ratio is spread; before each cut MRS is measured again on the current model."""
    epochs_between: int = Field(1, ge=0)
    """Number of fine-tuning epochs between two cuts."""
    repair: Literal["none", "batchnorm", "least_squares"] = "least_squares"
    """Repair after the cut, before any training: `least_squares` fits the layers behind the cut to the outputs of the
    dense model, `batchnorm` re-estimates batch-norm statistics."""
    repair_images: int = Field(512, ge=2)
    """Number of training images for the repair; least squares uses each of them clean and attacked."""


class TrainSettings(Section):
    """Adversarial training or fine-tuning."""

    loss: LossName = "n_fgsm"
    """Training loss."""
    epochs: int = Field(30, ge=0)
    """Number of passes over the training images."""
    batch_size: int = Field(128, ge=1)
    """Number of images in each step, over all processes."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate (SGD with Nesterov momentum). By default 0.1; in a run of fewer than 600 steps 0.1 times
    sqrt(steps / 600)."""
    warmup: float = Field(0.15, ge=0, lt=1)
    """Share of all steps during which the learning rate grows linearly to its peak; cosine decay to zero follows."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay of SGD; norms and biases are not decayed."""
    steps: int = Field(10, ge=1)
    """Number of gradient steps of the inner attack (pgd_at, trades, mart)."""
    beta: float = Field(6.0, ge=0)
    """Weight of the KL divergence in trades and mart."""
    distillation: float = Field(0.0, ge=0, le=1)
    """Weight in [0, 1] of adversarial distillation from the dense model in the loss (`compress` only)."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions in the distillation."""
    awp: float = Field(0.0, ge=0, lt=1)
    """Adversarial weight perturbation (AWP): size of the perturbation relative to the weights, before each gradient; 0
    disables it, 0.005 is usual. It costs one more forward and backward pass."""
    awp_warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps before AWP begins."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of the outer cross-entropy; the attack has none."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Final decay of the exponential moving average of weights, ramped up from 0; 0 disables the average."""
    clip_grad: float = Field(0.0, ge=0)
    """Largest gradient norm; 0 disables clipping."""
    crop_padding: int = Field(4, ge=0)
    """Padding of the random crop in pixels."""
    resized_crop: float | None = Field(None, gt=0, le=1)
    """Smallest share of the area of an image that a random crop takes, which is then resized (RandomResizedCrop of
    torchvision, sides at ratios of 3/4 to 4/3), in place of `crop_padding`; 0.08 is usual for ImageNet, off by
    default. Images on disk are cropped as they are stored, those in memory as they are held there."""
    flip: bool = True
    """Random horizontal flip."""
    validation_images: int = Field(500, ge=0)
    """Number of held-out images that are scored after each epoch, the same ones each time, of all classes."""
    validation_steps: int = Field(10, ge=1)
    """Number of PGD steps of this score."""
    precision: Literal["auto", "fp32"] = "auto"
    """`auto` times precisions and memory layouts and uses the fastest, which may differ between runs; `fp32` is single
    precision in contiguous layout, so that the same command gives bit-identical results on one machine."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """`torch.compile` of the model for attack and training step: `auto` times it on a GPU if the run takes more than
    five minutes, and uses it if it is faster; `on` uses it whenever the model compiles. In one process only."""
    workers: int | None = Field(None, ge=0, le=256)
    """Processes that decode images from disk ahead, for each training process; 0 decodes within the step. By default
    half of the cores, at most 8. Images in memory need none."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers to which each epoch is logged; their packages must be installed."""


class FinetuneSettings(TrainSettings):
    """Adversarial fine-tuning after a cut, with defaults for short runs."""

    epochs: int = Field(4, ge=0)
    """Number of passes over the training images."""
    crop_padding: int = Field(0, ge=0)
    """Padding of the random crop in pixels; 0 by default, since the dense model was trained on shifted images and short
    runs are better without crops (`benchmarks/README.md` has the pilot)."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Final decay of the exponential moving average of weights, ramped up from 0; 0 disables the average."""


class EvaluationSection(Section):
    """Measurement of robust accuracy."""

    tier: TierName = "pgd"
    """Strength of the attack, printed next to every result."""
    steps: int = Field(20, ge=1)
    """Number of PGD steps."""
    restarts: int = Field(2, ge=1)
    """Number of random restarts of PGD, which climb the margin and the cross-entropy in turn; an image is robust only
    if it survives all of them."""
    sweep: tuple[Radius, ...] = ()
    """Further radii at which 256 of the images are attacked by PGD; fractions such as 4/255 are allowed."""
    images: int | None = Field(None, ge=1)
    """Number of test images, drawn with the class shares of the test set. They are the same whatever the seed of the
    run, and fewer are a part of more. All of them by default."""
    batch_size: int | None = Field(None, ge=1)
    """Number of images in a batch; by default 250, fewer above 64x64 pixels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the attacks' gradients: `auto` is bf16 where the hardware supports it. Results of attacks are always
    scored in fp32."""


class ExportSection(Section):
    """Export of ONNX files."""

    opset: int = Field(18, ge=18)
    """ONNX operator set version, 18 or newer."""
    precisions: tuple[Literal["fp16", "int8"], ...] = ()
    """Lower precisions in which the pruned model is also exported; each file is evaluated and timed."""
    calibration_images: int = Field(128, ge=9)
    """Number of training images for the calibration of int8 and for the checks of fp16 and int8."""


class BenchSection(Section):
    """Latency of the exported files."""

    batches: tuple[Count, ...] = Field((1, 32), min_length=1)
    """Batch sizes."""
    threads: tuple[Count, ...] = Field((1,), min_length=1)
    """Numbers of intra-op threads."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """ONNX Runtime execution provider; a fallback to another provider is an error."""
    kinds: tuple[Literal["host", "device", "graph", "defaults"], ...] = Field(("host", "defaults"), min_length=1)
    """Transfer of inputs and outputs: arrays (`host`), device memory (`device`), or device memory and a CUDA graph
    (`graph`, on GPU providers). `defaults` is `host` with the number of threads that ONNX Runtime takes by itself, as
    in a program that sets nothing."""
    seconds: float = Field(20.0, gt=0)
    """Seconds of timed runs, over all files, for each combination of batch size, threads and kind."""


class BaselineSection(Section):
    """Baseline of the pruned model."""

    kind: Literal["none", "scratch"] = "none"
    """`scratch` trains the pruned architecture from fresh weights as `training` says except for its length."""
    minutes: float | None = Field(None, gt=0)
    """Minutes of this training; by default the time of fine-tuning."""


Recovery = Literal["quick", "standard", "best"]
RECOVERIES: dict[Recovery, dict[str, Any]] = {
    "quick": {"loss": "n_fgsm", "epochs": 1, "crop_padding": 0, "awp": 0.0, "distillation": 0.0},
    "standard": {"loss": "n_fgsm", "epochs": 4, "crop_padding": 0, "awp": 0.0, "distillation": 0.0},
    "best": {"loss": "pgd_at", "epochs": 12, "crop_padding": 4, "steps": 10, "awp": 0.005, "distillation": 0.0},
}
"""Presets of fine-tuning after the cut, which replace method and length of a recipe. `benchmarks/results/recovery.md`
compares what methods recover in equal time."""


class Recipe(Section):
    """Settings of a run."""

    seed: int = Field(0, ge=0)
    """Random seed of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of torch; `auto` is `cuda` if torch finds a GPU."""
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
    """Baseline of the pruned model (`compress`)."""
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    bench: BenchSection = BenchSection()

    @model_validator(mode="after")
    def _sweep_can_be_meant(self) -> Self:
        if "norm" in self.threat.model_fields_set:
            _refuse(("evaluation", "sweep"), self.threat.norm, self.evaluation.sweep)
        return self

    @property
    def threat_model(self) -> ThreatModel:
        """Threat model of the section ``threat``."""
        from .attacks.threat import ThreatModel

        return ThreatModel(self.threat.norm, self.threat.epsilon)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, with all values."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
