"""Learn how many channels each branch of a network should have, under an exact FLOPs budget, and prove it.

>>> result = allocator.allocate(model, flops=4.2e9)  # doctest: +SKIP
>>> result.model, result.allocation, result.certificate  # doctest: +SKIP
"""

from .allocation import Allocation
from .api import Result, allocate, apply, plan, rewrite, score, trace, verify
from .blocks import Block, Branch
from .build import build
from .certificate import Certificate
from .criteria import Scores, criterion
from .errors import (
    AdapterError,
    AllocationMismatchError,
    AllocatorError,
    AllocatorWarning,
    BudgetError,
    BudgetNotBindingWarning,
    CertificateError,
    ConfigurationError,
    CostMismatchError,
    CriterionError,
    CriterionFallbackWarning,
    DataError,
    ExportError,
    FileError,
    InputError,
    MissingPackageError,
    NothingToAllocateError,
    RewriteError,
    TraceError,
    UninformativeScoresWarning,
    UnknownNameError,
    UnsafeFileError,
    UnsupportedModelError,
    ValueDependentTraceWarning,
)
from .exporting import export
from .files import load_model, save_model
from .graph import ChannelGraph, Neuron
from .results import load_result as load
from .results import save_result as save
from .timing import Latency, latency

__all__ = [
    "AdapterError",
    "Allocation",
    "AllocationMismatchError",
    "AllocatorError",
    "AllocatorWarning",
    "Block",
    "Branch",
    "BudgetError",
    "BudgetNotBindingWarning",
    "Certificate",
    "CertificateError",
    "ChannelGraph",
    "ConfigurationError",
    "CostMismatchError",
    "CriterionError",
    "CriterionFallbackWarning",
    "DataError",
    "ExportError",
    "FileError",
    "InputError",
    "Latency",
    "MissingPackageError",
    "Neuron",
    "NothingToAllocateError",
    "Result",
    "RewriteError",
    "Scores",
    "TraceError",
    "UninformativeScoresWarning",
    "UnknownNameError",
    "UnsafeFileError",
    "UnsupportedModelError",
    "ValueDependentTraceWarning",
    "allocate",
    "apply",
    "build",
    "criterion",
    "export",
    "latency",
    "load",
    "load_model",
    "plan",
    "rewrite",
    "save",
    "save_model",
    "score",
    "trace",
    "verify",
]
