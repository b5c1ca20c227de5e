"""The main job on the oldest torch that pyproject.toml allows: what passes, what fails, what is skipped and why.

`make oldest` makes the environment and runs this in it; arguments go on to pytest.
"""

from __future__ import annotations

import collections
import datetime
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

from .common import RESULTS, ROOT, table

COMMAND = "make oldest"
# From a model to a certified smaller one by every road that needs no later library, and what comes before and after it.
MAIN_JOB = (
    "adapters",
    "attention",
    "bad_input",
    "blocks",
    "budgets",
    "build",
    "certificate",
    "cli",
    "cost",
    "criteria",
    "draws",
    "files",
    "fitting",
    "float64",
    "flow",
    "graph",
    "group_norms",
    "hostile",
    "index_map",
    "isolation",
    "iterate",
    "kinds",
    "meta_kernels",
    "pickle_rehearsal",
    "planning",
    "programs",
    "recovering",
    "recovering_inputs",
    "reference_set",
    "result",
    "results",
    "rules",
    "scalenet",
    "structure",
    "switches",
    "torch_attention",
    "torch_private",
    "unusual_operators",
    "versions",
    "widening",
    "with_data",
)
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "networkx", "fvcore", "safetensors", "rich")


def main(options: list[str]) -> int:
    """Run the tests and write what came of them; pytest's exit status."""
    files = [f"tests/test_{name}.py" for name in MAIN_JOB]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *options, *files]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.exists():
            return status
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    (RESULTS / "oldest_torch.md").write_text(_page(cases), encoding="utf-8")
    print("wrote benchmarks/results/oldest_torch.md")
    return status


def _page(cases: list[ElementTree.Element]) -> str:
    """The result as Markdown."""
    outcomes: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    failed = []
    for case in cases:
        outcome = _outcome(case)
        outcomes[outcome] += 1
        if outcome == "skipped":
            skipped[case.find("skipped").get("message", "")] += 1  # type: ignore[union-attr]
        elif outcome == "failed":
            failed.append(f"- `{case.get('classname')}::{case.get('name')}`")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# The oldest torch",
        "",
        f"Made by `{COMMAND}`, on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}: "
        f"Python {platform.python_version()}, {versions}.",
        "The rest of the tests need newer libraries, or are not about the main job.",
        "",
        table(("passed", "failed", "skipped"), [[outcomes[name] for name in ("passed", "failed", "skipped")]]),
    ]
    if failed:
        lines += ["", "Failed:", "", *failed]
    if skipped:
        lines += ["", "Skipped:", "", *(f"- {count} times: {reason}" for reason, count in skipped.most_common())]
    return "\n".join(lines) + "\n"


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
