"""What contradicts in a configuration: values of the right type that cannot be, alone or beside others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from allocator.cost.budget import check_limit
from allocator.errors import AllocatorError, BudgetError, InputError, UnknownNameError
from allocator.planning.problem import Widths
from allocator.recipes.sections import AllocationPlan, Config, Data, Detector, Training
from allocator.scoring.registry import AUTO, find_criterion
from allocator.settings import BUDGETS, KNOWN_POLICIES, METHODS, Weights, check_choice, method_of
from allocator.settings import CHOICES as ALLOCATION_CHOICES

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


def contradictions(config: Config) -> list[str]:
    """All of them, in words; empty where the configuration can be run."""
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
    flat = config.flat()
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
