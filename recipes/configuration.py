"""What a training run is: plain dataclasses, read from YAML, checked as a whole before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from allocator.cost.budget import check_limit
from allocator.disk import existing
from allocator.errors import (
    AllocatorError,
    BudgetError,
    ConfigurationError,
    InputError,
    MissingPackageError,
    UnknownNameError,
    a_kind,
    did_you_mean,
)
from allocator.planning.problem import Widths
from allocator.recipes.parsing import parse
from allocator.scoring.registry import AUTO, find_criterion
from allocator.settings import (
    BUDGETS,
    KNOWN_POLICIES,
    METHODS,
    OPTIONS,
    RECOVERING,
    Limits,
    Method,
    Scope,
    Settings,
    Weights,
    check_choice,
    method_of,
)
from allocator.settings import CHOICES as ALLOCATION_CHOICES

CONFIGS = Path(__file__).parent / "configs"


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

    def what_decides(self) -> dict[str, Any]:
        """The part that the result depends on, flat, with dotted keys."""
        # A run may go on in another place, on another device and with other workers. What becomes of images that
        # cannot be read (data.corrupt) does decide: it sets other images in their place.
        without = ("run.", "data.root", "data.workers", "data.check", "device")
        flat = _flat(self.to_dict())
        return {key: value for key, value in flat.items() if not key.startswith(without)}


def _without_tuples(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A section with lists for tuples: YAML and JSON have no others, and would give back what is not equal."""
    section = {}
    for key, value in pairs:
        section[key] = list(value) if isinstance(value, tuple) else value
    return section


def config_names() -> list[str]:
    """The configurations that are installed with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(source: str | Path | Mapping[str, Any] | Config, settings: Sequence[str] = ()) -> Config:
    """Read a configuration and check it.

    Args:
        source: a YAML file, the name of an installed one (`config_names`), or its contents.
        settings: changes to it, each of the form `section.key=value`, the value in YAML.

    Raises:
        ConfigurationError: keys or values do not fit; the message lists them all.
        UnknownNameError: neither a file nor an installed configuration.
        FileError: the file cannot be read.
    """
    if isinstance(source, Config):
        data = source.to_dict()
    elif isinstance(source, Mapping):
        data = dict(source)
    else:
        data = _read(source)
    for setting in settings:
        _set(data, setting)
    # As in other YAML formats, sections called x-... hold what others refer to.
    sections = {key: value for key, value in data.items() if not key.startswith("x-")}
    problems: list[str] = []
    config = parse(Config, sections, "", problems)
    if config is not None:
        problems += _contradictions(config)
    if problems or config is None:
        raise ConfigurationError("the configuration does not fit:\n  " + "\n  ".join(problems))
    return config


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError("configurations are YAML: pip install 'neuron-allocator[train]'") from error
    return yaml


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{str(source).replace('-', '_')}.yaml"
        if not path.exists():
            names = config_names()
            hint = did_you_mean(str(source), names, most=3, cutoff=0.4) or f"installed: {', '.join(names)}"
            raise UnknownNameError(f"{str(source)!r} is neither a .yaml file nor an installed configuration; {hint}")
    yaml = _yaml()
    try:
        data = yaml.safe_load(existing(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected sections (network, data, ...), got {a_kind(data)}")
    return data


def _set(data: dict[str, Any], setting: str) -> None:
    """Put `section.key=value` into the data; `section=null` leaves a section out."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise ConfigurationError(f"{setting!r} is not of the form section.key=value")
    *sections, key = path.split(".")
    for section in sections:
        values = data.get(section)
        if values is None:
            values = {}
        elif not isinstance(values, dict):
            raise ConfigurationError(f"{setting!r}: {section} is no section")
        # A copy: sections that YAML's anchors make alike are one dict, of which only this one is to change.
        data[section] = dict(values)
        data = data[section]
    yaml = _yaml()
    try:
        data[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{setting!r}: the value is not YAML ({error})") from error


_CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("classification", "detection"),
    "data.augment": ("none", "shift", "imagenet", "flip"),
    "data.corrupt": ("stop", "skip"),
    "seed.schedule": ("cosine", "steps"),
    "final.schedule": ("cosine", "steps"),
    "allocation.weights": get_args(Weights),
    "allocation.policy": KNOWN_POLICIES,
    **{f"allocation.{name}": choices for name, choices in ALLOCATION_CHOICES.items()},
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu"),
}
# key: smallest value, and whether that value itself is allowed
_LEAST: dict[str, tuple[float, bool]] = {
    "epochs": (1, True),
    "lr": (0, False),
    "batch_size": (1, True),
    "device_batch": (1, True),
    "gamma": (0, False),
    "warmup": (0, True),
    "momentum": (0, True),
    "weight_decay": (0, True),
    "label_smoothing": (0, True),
    "l1": (0, True),
    "clip": (0, False),
    "average": (0, False),
    "recalibrate": (0, True),
}


def _contradictions(config: Config) -> list[str]:
    """Values that are of the right type and yet cannot be, alone or beside others."""
    problems = _choice_problems(config)
    for section, training in config.trainings().items():
        problems += _training_problems(section, training)
    problems += _stage_problems(config)
    problems += _data_problems(config)
    if config.allocation is not None:
        problems += _allocation_problems(config.allocation, config.task)
    if config.task == "detection":
        return problems + _detection_problems(config)
    return problems + _classification_problems(config)


def _choice_problems(config: Config) -> list[str]:
    flat = _flat(config.to_dict())
    problems = []
    for key, choices in _CHOICES.items():
        # Sections that are left out have no keys.
        if key in flat and flat[key] not in choices:
            problems.append(f"{key}: expected {' or '.join(choices)}, got {flat[key]!r}")
    return problems


def _stage_problems(config: Config) -> list[str]:
    problems = []
    if config.seed is None and config.final is None:
        problems.append("nothing to train: give seed, final or both")
    if config.final is not None and config.seed is not None and config.allocation is None:
        problems.append("seed and final without an allocation between them: give allocation, or only final")
    return problems


def _allocation_problems(plan: AllocationPlan, task: str) -> list[str]:
    problems = []
    for name in BUDGETS:
        limit = getattr(plan, name)
        if limit is not None:
            problems += _problem(BudgetError, check_limit, name, limit)
    floors = plan.at_least.values() if isinstance(plan.at_least, Mapping) else [plan.at_least]
    for floor in floors:
        problems += _problem(InputError, Widths(floor).minimum, "", 1)
    for name in ("exclude", "include", "same"):
        problems += _pattern_problems(name, getattr(plan, name))
    if plan.multiple < 1 or plan.samples < 1:
        problems.append("expected allocation.multiple and allocation.samples above zero")
    for name in plan.criteria():
        problems += [] if name == AUTO else _problem(UnknownNameError, find_criterion, name)
    problems += _recovery_problems(plan, task)
    if not problems and task == "detection" and plan.looks_at_data():
        problems.append(f"allocation.criterion={plan.criterion!r} looks at data, which is not for detectors yet")
    return problems


def _recovery_problems(plan: AllocationPlan, task: str) -> list[str]:
    method = method_of(plan.recover)
    if method is None:
        return []
    problems = _problem(UnknownNameError, check_choice, "recover", method, METHODS)
    if plan.weights == "reset":
        problems.append(
            "allocation.recover refits the weights that are kept: set allocation.weights=keep, or leave it out"
        )
    if plan.file is not None:
        problems.append("allocation.recover refits what is chosen here: leave out allocation.file, or recover")
    if task == "detection":
        problems.append("allocation.recover looks at data, which is not for detectors yet")
    return problems


def _problem(kind: type[AllocatorError], check: Callable[..., Any], *args: Any) -> list[str]:
    """What a check has to say of a value of the allocation, if anything."""
    try:
        check(*args)
    except kind as error:
        return [f"allocation: {error}"]
    return []


def _pattern_problems(name: str, given: Sequence[Any]) -> list[str]:
    """Modules and classes are for Python; here there are names, and lists of them for layers that stay alike."""
    for item in given:
        names = item if name == "same" and isinstance(item, list) else [item]
        if not all(isinstance(each, str) for each in names):
            return [f"allocation.{name}: expected a list, each text, got {list(given)!r}"]
    return []


def _data_problems(config: Config) -> list[str]:
    problems = []
    if config.data.workers < 0 or config.run.checkpoint_updates < 1 or config.run.timeout <= 0:
        problems.append("expected data.workers >= 0, run.checkpoint_updates >= 1 and run.timeout > 0")
    if len(config.data.mean) != len(config.data.std):
        problems.append(f"data.mean has {len(config.data.mean)} values, data.std {len(config.data.std)}")
    if config.data.augment in ("shift", "imagenet") and config.data.side is None:
        problems.append(f"data.augment={config.data.augment} needs data.side")
    return problems


def _classification_problems(config: Config) -> list[str]:
    # Refused and not passed over: who gives these means to train a detector, and has forgotten the task.
    for_detection = {
        "detector": config.detector is not None,
        "data.dataset=coco": config.data.dataset == "coco",
        "data.annotations": config.data.annotations is not None,
        "data.augment=flip": config.data.augment == "flip",
    }
    problems = [f"{key} is for task=detection" for key, given in for_detection.items() if given]
    if config.network.allocation is not None:
        problems.append("network.allocation is for task=detection: apply it by allocation.file, with seed=null")
    return problems


def _detection_problems(config: Config) -> list[str]:
    problems = _coco_problems(config.data)
    for section, training in config.trainings().items():
        if training.label_smoothing or training.recalibrate:
            problems.append(f"{section}: label_smoothing and recalibrate are not for detectors")
    if config.detector is None:
        problems.append("task=detection needs a section detector")
    else:
        problems += _detector_problems(config.detector)
    return problems


def _coco_problems(data: Data) -> list[str]:
    problems = []
    if data.dataset != "coco":
        problems.append(f"data.dataset: expected coco for task=detection, got {data.dataset!r}")
    if data.augment not in ("flip", "none"):
        problems.append(f"data.augment: expected flip or none for task=detection, got {data.augment!r}")
    for_classification = {"side": data.side, "resize": data.resize, "mean": data.mean, "std": data.std}
    for key, value in for_classification.items():
        if value:
            problems.append(
                f"data.{key} is not for detectors, which bring images to size themselves: detector.min_size, max_size, "
                "settings"
            )
    return problems


def _detector_problems(detector: Detector) -> list[str]:
    problems = []
    if detector.num_classes < 2 or detector.out_channels < 1 or not 0 < detector.min_size <= detector.max_size:
        problems.append("expected detector.num_classes >= 2, out_channels >= 1 and 0 < min_size <= max_size")
    if detector.trained_stages is not None and detector.trained_stages < 0:
        problems.append(f"detector.trained_stages: expected a number >= 0, got {detector.trained_stages}")
    return problems


def _training_problems(section: str, training: Training) -> list[str]:
    problems = []
    for key, (least, included) in _LEAST.items():
        value = getattr(training, key)
        if value is not None and not _is_in_range(value, least, included):
            problems.append(f"{section}.{key}: expected a number {'>=' if included else '>'} {least}, got {value}")
    if training.device_batch is not None and training.batch_size % training.device_batch:
        problems.append(
            f"{section}.batch_size: expected a multiple of device_batch={training.device_batch}, got "
            f"{training.batch_size}"
        )
    if training.label_smoothing >= 1 or (training.average or 0) >= 1:
        problems.append(f"{section}: expected label_smoothing and average below 1")
    if training.schedule == "steps" and not training.milestones:
        problems.append(f"{section}.schedule=steps needs {section}.milestones, in epochs")
    return problems


def _is_in_range(value: float, least: float, included: bool) -> bool:
    # YAML has .inf and .nan, and they are floats: of the right type, but no rates or weights.
    if not math.isfinite(value):
        return False
    return value >= least if included else value > least


def _flat(data: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested sections as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{key}.")
        else:
            flat[place + str(key)] = value
    return flat
