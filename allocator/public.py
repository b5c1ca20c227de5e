"""What `allocator` gives by name, loaded together the first time that one of the names is asked for."""

import allocator.recipes  # noqa: F401 - makes their names known to `build`
from allocator import __version__
from allocator.api import allocate, apply, iterate, plan, recover, rewrite, score, sweep, trace, verify
from allocator.cost.latency import Latency, latency
from allocator.errors import (
    AdapterError,
    AllocationMismatchError,
    AllocatorError,
    AllocatorWarning,
    ArgumentsError,
    BudgetError,
    BudgetNotBindingWarning,
    CertificateError,
    ConfigurationError,
    CostMismatchError,
    CriterionError,
    DataError,
    ExportError,
    FileError,
    InputError,
    IterationError,
    MissingPackageError,
    NothingToAllocateError,
    NotSelfContainedWarning,
    PolicyError,
    RecoveryError,
    RewriteError,
    SweepError,
    TraceError,
    UninformativeScoresWarning,
    UnknownNameError,
    UnmatchedPatternWarning,
    UnsafeFileError,
    UnsupportedModelError,
    ValueDependentTraceWarning,
)
from allocator.folders import allocate_folder, apply_folder
from allocator.graph.blocks import Block, Branch
from allocator.graph.channel_graph import ChannelGraph, Neuron
from allocator.growing import restore, seed, widen
from allocator.hub import from_hub, push_to_hub
from allocator.io.export import export
from allocator.io.files import load_model, save_model
from allocator.io.models import build
from allocator.io.results import load_result as load
from allocator.io.results import save_result as save
from allocator.pipeline.iterate import Iterated
from allocator.pipeline.sweep import Sweep
from allocator.planning.policies.ordered import ordered
from allocator.planning.policies.registry import policy
from allocator.planning.problem import Problem
from allocator.recovering.record import Recovery
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.scoring.calibration import Statistics
from allocator.scoring.registry import criterion
from allocator.scoring.scores import Scores
from allocator.verifying.certificate import Certificate

__all__ = [
    "__version__",
    "AdapterError",
    "Allocation",
    "AllocationMismatchError",
    "AllocatorError",
    "AllocatorWarning",
    "ArgumentsError",
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
    "DataError",
    "ExportError",
    "FileError",
    "InputError",
    "Iterated",
    "IterationError",
    "Latency",
    "MissingPackageError",
    "Neuron",
    "NotSelfContainedWarning",
    "NothingToAllocateError",
    "PolicyError",
    "Recovery",
    "RecoveryError",
    "Problem",
    "Result",
    "RewriteError",
    "Scores",
    "Statistics",
    "Sweep",
    "SweepError",
    "TraceError",
    "UninformativeScoresWarning",
    "UnknownNameError",
    "UnmatchedPatternWarning",
    "UnsafeFileError",
    "UnsupportedModelError",
    "ValueDependentTraceWarning",
    "allocate",
    "allocate_folder",
    "apply",
    "apply_folder",
    "build",
    "criterion",
    "export",
    "from_hub",
    "iterate",
    "latency",
    "load",
    "load_model",
    "ordered",
    "plan",
    "recover",
    "policy",
    "push_to_hub",
    "restore",
    "rewrite",
    "save",
    "save_model",
    "score",
    "seed",
    "sweep",
    "trace",
    "verify",
    "widen",
]
