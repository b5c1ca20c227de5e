"""What a training run is: plain dataclasses, one for each section of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from allocator.scoring.registry import AUTO, find_criterion
from allocator.settings import BUDGETS, OPTIONS, RECOVERING, Limits, Method, Scope, Settings, Weights


@dataclass(frozen=True)
class Network:
    """The network to start from: the seed, or one to be trained as it is.

    Attributes:
        name: as for `allocator.build`, such as `recipe:scalenet50-seed`.
        arguments: passed to its constructor, such as `num_classes`.
        weights: file to start from, instead of fresh weights. For detectors, a saved result (.safetensors) brings
            its allocation, too.
        allocation: file of the allocation that a detector's network has already.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    allocation: str | None = None


@dataclass(frozen=True)
class Detector:
    """Faster R-CNN with a feature pyramid on the network; see `detection.faster_rcnn`.

    Attributes:
        num_classes: classes with the background; 91 for COCO.
        out_channels: width of the pyramid.
        min_size, max_size: images are resized so that their shorter side is `min_size` pixels, or their longer
            one `max_size` if that is smaller.
        frozen_norms: keep the network's batch norms as they are. None: where it starts from weights.
        trained_stages: how many of the network's last stages are trained, and the stem only with all of them.
            None: all, and all but the first where the network starts from weights.
        settings: passed to torchvision's `FasterRCNN` on top.
    """

    num_classes: int = 91
    out_channels: int = 256
    min_size: int = 800
    max_size: int = 1333
    frozen_norms: bool | None = None
    trained_stages: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """Images for training and test.

    Attributes:
        dataset: `folder` (torchvision's ImageFolder), `digits` (those that scikit-learn ships),
            `torchvision:NAME`, or `coco` for detectors.
        root: the folder that the data are in.
        train, test: sub-folders of `root`, for `folder` and `coco`.
        annotations: for `coco`, the file in `root`, where {part} stands for the name of the sub-folder; None for
            `annotations/instances_{part}.json`.
        arguments: passed to the data set's constructor.
        train_arguments, test_arguments: passed to one of the two on top, such as `split: extra`.
        side: side in pixels that images are brought to; None leaves them as they are.
        resize: shorter side in pixels ahead of the test's centre crop.
        augment: `imagenet` (random resized crop, flip), `shift` (padded random crop, flip), `flip` (detectors)
            or `none`.
        mean, std: of each channel with values in 0..1, for normalisation.
        corrupt: `stop` at an image that cannot be read, or `skip` it.
        check: read every image once ahead of the training, to name and count those that cannot be.
        workers: processes per rank that read images.
    """

    dataset: str = "folder"
    root: str | None = None
    train: str = "train"
    test: str = "val"
    annotations: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    train_arguments: dict[str, Any] = field(default_factory=dict)
    test_arguments: dict[str, Any] = field(default_factory=dict)
    side: int | None = None
    resize: int | None = None
    augment: str = "none"
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    corrupt: str = "stop"
    check: bool = False
    workers: int = 0


@dataclass(frozen=True)
class Training:
    """How one network is trained: stochastic gradient descent with momentum.

    Attributes:
        epochs: passes over the data.
        lr: highest learning rate, for a whole batch.
        batch_size: images per update, over all processes.
        device_batch: images per forward and process, which is also what batch norm averages over; the
            gradients of `batch_size / (device_batch * processes)` forwards are accumulated. None: one forward.
        schedule: `cosine`, or `steps`, which multiplies the rate by `gamma` at each of the `milestones`.
        milestones: in epochs.
        gamma: factor per milestone.
        warmup: epochs of linear rise.
        momentum, nesterov, weight_decay: of the optimiser.
        label_smoothing: probability spread over all classes.
        l1: weight of the sum of the batch norms' absolute scales in the loss.
        clip: largest norm of the gradient; None for no limit.
        average: decay per update of the exponential moving average of the weights, which then is the
            result; None for none.
        recalibrate: batches over which batch norm's statistics are computed anew at the end; 0 for none.
    """

    epochs: int
    lr: float = 0.1
    batch_size: int = 64
    device_batch: int | None = None
    schedule: str = "cosine"
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    warmup: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    l1: float = 0.0
    clip: float | None = None
    average: float | None = None
    recalibrate: int = 0


@dataclass(frozen=True)
class AllocationPlan(Settings, Limits):
    """How the network is made smaller: every budget and every option of `allocator.settings`, for one image.

    A seed is trained so that its batch norms tell its neurons apart, and what is left of it is trained from scratch;
    so the paper's rule and fresh weights are the defaults here: `bn_scale`, `per_block` (which is what `auto` comes to)
    and the `narrowest` scope. Where no budget is given, it is half of the FLOPs.

    Attributes:
        criterion: one name, or several, whose rankings are averaged; one that looks at data gets training images.
        samples: how many training images such a criterion looks at, over all processes.
        weights: `reset` to train from scratch, `keep` to fine-tune.
        recover: refit the weights that are kept on training images, without their labels, before what is left is
            trained: a method of `allocator.recover`, or true for its `auto`.
        file: an allocation to apply, instead of one learned here.
    """

    criterion: str | list[str] = "bn_scale"
    scope: Scope = "narrowest"
    samples: int = 256
    weights: Weights = "reset"
    recover: bool | Method = RECOVERING.recover
    file: str | None = None

    def budgets(self) -> dict[str, float | str]:
        """The budgets, by the names of the keyword arguments of `allocator.allocate`."""
        return {name: limit for name in BUDGETS if (limit := getattr(self, name)) is not None} or {"flops": "50%"}

    def options(self) -> dict[str, Any]:
        """Every option, by the names of the keyword arguments of `allocator.allocate`."""
        return {name: getattr(self, name) for name in OPTIONS}

    def criteria(self) -> list[str]:
        """The names of the criteria; there may be none of such a name."""
        return [self.criterion] if isinstance(self.criterion, str) else self.criterion

    def looks_at_data(self) -> bool:
        """Whether a criterion needs images."""
        return any(name != AUTO and bool(find_criterion(name).needs) for name in self.criteria())


@dataclass(frozen=True)
class Running:
    """Where and how often; none of it changes the result.

    Attributes:
        output: folder for checkpoints, logs and results.
        checkpoint_updates: updates between checkpoints; one is written after each epoch anyway.
        tensorboard: write logs for it.
        timeout: seconds after which ranks that wait for a lost one give up.
    """

    output: str = "runs/run"
    checkpoint_updates: int = 1000
    tensorboard: bool = True
    timeout: float = 600.0


@dataclass(frozen=True)
class Config:
    """A whole run: train the network, allocate, train what is left.

    Attributes:
        network: what to start from.
        data: what to train and test on.
        seed: training of the network as it is; None to leave it out.
        allocation: how it is made smaller; None to leave it out.
        final: training of the smaller network; None to leave it out.
        task: `classification`, or `detection`, where the networks are detectors on `network`.
        detector: the detector, for `detection`.
        random_seed: decides weights, order and augmentation.
        precision: `fp32`, `bf16` or `fp16`.
        device: `auto` for accelerate's choice, or `cpu`.
        run: where and how often.
    """

    network: Network
    data: Data
    seed: Training | None = None
    allocation: AllocationPlan | None = None
    final: Training | None = None
    task: str = "classification"
    detector: Detector | None = None
    random_seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    run: Running = field(default_factory=Running)

    def trainings(self) -> dict[str, Training]:
        """The sections of the networks that are trained, by name."""
        trainings = {}
        if self.seed is not None:
            trainings["seed"] = self.seed
        if self.final is not None:
            trainings["final"] = self.final
        return trainings

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML holds it."""
        return asdict(self, dict_factory=_without_tuples)

    def flat(self) -> dict[str, Any]:
        """Plain data with dotted keys; sections that are left out are None by their names."""
        return _flat(self.to_dict())

    def what_decides(self) -> dict[str, Any]:
        """The part that the result depends on, flat, with dotted keys."""
        # A run may go on in another place, on another device and with other workers. What becomes of images that
        # cannot be read (data.corrupt) does decide: it sets other images in their place.
        without = ("run.", "data.root", "data.workers", "data.check", "device")
        return {key: value for key, value in self.flat().items() if not key.startswith(without)}


def _without_tuples(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A section with lists for tuples: YAML and JSON have no others, and would give back what is not equal."""
    section = {}
    for key, value in pairs:
        section[key] = list(value) if isinstance(value, tuple) else value
    return section


def _flat(data: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested sections as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{key}.")
        else:
            flat[place + str(key)] = value
    return flat
