"""The house: what is named where, and who may look at what."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest

import allocator
import allocator.operators  # fills the tables, also where no other test has done so
from allocator.settings import BUDGETS, DEFAULTS, OPTIONS, Settings
from allocator.tracing.operators import DECLARATIONS, FUNCTIONS

PACKAGE = Path(allocator.__file__).parent
OPERATORS = {name.rpartition("::")[2] for name in DECLARATIONS} | set(FUNCTIONS)
# Words of the field that some operator happens to be called like, with what they say here.
WORDS = {
    "all": "a scope",
    "batch_norm": "a way to recover",
    "complex": "a kind of number",
    "concat": "a kind of aggregation point",
    "copy": "what is added to a wider network",
    "full": "how large the inputs are that a certificate compares outputs on",
    "inner": "a scope",
    "mean": "how entries make a score",
    "random": "a criterion",
    "split": "a kind of block",
    "stack": "a kind of aggregation point",
    "sum": "a kind of aggregation point, or how entries make a score",
    "uniform": "a policy",
    "zero": "what is added to a wider network",
}
# Files that speak of other things than the calls of a forward: words and charts of reports, fvcore's names, a call that
# torch's private names are tried on, and the language of TorchScript's files, whose arithmetic on numbers is called
# like operators on tensors.
ELSEWHERE = (
    "operators/",
    "reporting/",
    "cost/fvcore.py",
    "io/programs/torchscript_operators.py",
    "torch_private.py",
)
# Libraries that extras bring: each is imported by the function that needs it.
OPTIONAL = {
    "PIL",
    "accelerate",
    "matplotlib",
    "lightning",
    "monai",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "pycocotools",
    "segmentation_models_pytorch",
    "sklearn",
    "tensorboard",
    "timm",
    "torchcrepe",
    "torchvision",
    "transformers",
    "ultralytics",
    "vl_convert",
    "yaml",
}


def test_importing_any_module_imports_no_optional_library() -> None:
    script = """
import importlib, pkgutil, sys
import torch
of_torch = set(sys.modules)
import allocator
for package in (allocator, importlib.import_module("allocator.adapters"), importlib.import_module("allocator.recipes")):
    for module in pkgutil.walk_packages(package.__path__[:1], f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert {"allocator.cli.report", "allocator.adapters.timm", "allocator.recipes.run"} <= sys.modules.keys()
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - of_torch}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert OPTIONAL.isdisjoint(done.stdout.split())


def test_operators_are_named_where_they_are_declared_and_nowhere_else() -> None:
    assert {"convolution", "cat", "native_group_norm"} <= OPERATORS
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith(ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value.rstrip("_")
                if name in OPERATORS and name not in WORDS:
                    named.append(f"{place}:{node.lineno} names {node.value!r}")
    assert named == []


@pytest.mark.parametrize("function", [allocator.allocate, allocator.trace, allocator.plan])
def test_keyword_arguments_are_options_and_budgets_with_the_defaults_that_are_declared(function: Any) -> None:
    """They are written out, so that an editor completes them; what they may be stands in `settings`."""
    parameters = inspect.signature(function).parameters
    names = {*OPTIONS, *BUDGETS} if function is allocator.allocate else OPTIONS.keys() & parameters.keys()
    assert len(names) > 4
    declared = {**dict.fromkeys(BUDGETS), **{name: getattr(DEFAULTS, name) for name in OPTIONS}}
    assert {name: parameters[name].default for name in names} == {name: declared[name] for name in names}
    hints, of_settings = get_type_hints(function), get_type_hints(Settings)
    for name in names & of_settings.keys():
        if get_origin(of_settings[name]) is Literal:
            assert hints[name] == of_settings[name], name
