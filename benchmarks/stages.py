"""Where the time of a call goes: CPU time by stage, sampled while it runs.

python -m benchmarks.stages torchvision:resnet50
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from .common import ROOT, table

from reference_set import randomised  # isort: skip

import allocator

PACKAGE = str(ROOT / "allocator") + "/"
INTERVAL = 0.001

# A call below one of these files, or of these functions, belongs to its stage, whatever file it runs in.
WITHIN_FILES = {
    "cost/fvcore.py": "fvcore's count",
    "verifying/certificate.py": "certificate",
    "graph/blocks.py": "blocks",
}
WITHIN = {
    ("fitting/check.py", "check_structure"): "structural check",
    ("rewriting/materialise.py", "materialise"): "rewrite",
}
# Otherwise the innermost file of the package tells, by its room.
FILES = {
    "tracing": "trace",
    "modules.py": "trace",
    "model_checks.py": "trace",
    "flow": "flow",
    "graph": "flow",
    "operators": "flow",
    "scoring": "score",
    "cost": "plan",
    "planning": "plan",
    "fitting": "plan",
    "rewriting": "plan",
}
ORDER = (
    "trace", "flow", "score", "plan", "structural check", "blocks", "rewrite", "fvcore's count", "certificate", "other",
)  # fmt: skip


def stage_of(frame: FrameType | None) -> str:
    """The stage that a stack belongs to."""
    innermost = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            path = code.co_filename[len(PACKAGE) :]
            found = WITHIN_FILES.get(path) or WITHIN.get((path, code.co_name))
            if found:
                return found
            innermost = innermost or path.partition("/")[0]
        frame = frame.f_back
    return FILES.get(innermost, "other")


def sample(function: Callable[[], object]) -> dict[str, float]:
    """Call `function` and say how much CPU time went into each stage.

    A timer interrupts every millisecond of CPU time; what has passed since the last interrupt is booked on
    the stage that is running, so that a long call outside Python counts in full.

    Returns:
        Seconds per stage, in the order of the flow.
    """
    seconds = dict.fromkeys(ORDER, 0.0)
    last = time.process_time()

    def book(_: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.process_time()
        seconds[stage_of(frame)] += now - last
        last = now

    before = signal.signal(signal.SIGPROF, book)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    try:
        function()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return seconds


def _check_names() -> None:
    """Files and functions that stages are told by must be there, or time would go to the wrong stage."""
    package = Path(PACKAGE)
    missing = [name for name in (*WITHIN_FILES, *FILES) if not (package / name).exists()]
    for file, function in WITHIN:
        if f"\ndef {function}(" not in (package / file).read_text(encoding="utf-8"):
            missing.append(f"{file}: {function}")
    if missing:
        raise LookupError(f"benchmarks/stages.py knows stages by names that are gone: {', '.join(missing)}")


def stages(name: str, repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds per stage of `allocate(model, "60%")`, after one call to warm up.

    The garbage collector looks through the whole process in some of the calls, in whatever stage it comes.
    """
    warnings.simplefilter("ignore")
    _check_names()
    model = randomised(name)
    allocator.allocate(model, flops="60%")
    found = [sample(lambda: allocator.allocate(model, flops="60%")) for _ in range(repeats)]
    return {stage: round(statistics.median(each[stage] for each in found), 5) for stage in ORDER}


def main() -> None:
    """Print a table for the models named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="names as for allocator.build")
    for name in parser.parse_args().models:
        found = stages(name)
        rows = [(stage, f"{1000 * s:.0f}", f"{100 * s / sum(found.values()):.0f} %") for stage, s in found.items()]
        print(f"{name}\n{table(('stage', 'ms of CPU', 'share'), rows)}\n")


if __name__ == "__main__":
    main()
