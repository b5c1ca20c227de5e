"""Speed and memory, beside Torch-Pruning in one process on one thread.

python -m benchmarks.speed                                   # everything, into results/speed.{json,md}
python -m benchmarks.speed --parts scaling memory            # these parts anew, the others kept
python -m benchmarks.speed --parts compare --models torchvision:resnet50    # this row anew, the others kept
python -m benchmarks.speed --parts compare --models torchvision:resnet50 --print   # shown, not written
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import memory, peer
from .common import environment, median, read, timed, write
from .speed_report import markdown
from .stages import stages

from reference_set import REFERENCE_SET, example, fvcore_count, randomised  # isort: skip

import allocator

SHARE = 60
FAMILIES = {
    "resnet": [f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)],
    "densenet": [f"torchvision:densenet{depth}" for depth in (121, 169, 201)],
}
PARTS = ("compare", "scaling", "memory", "stages")
APART = ("fvcore", "certificate")

Data = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


def ours(model: Any) -> tuple[allocator.Result, dict[str, float]]:
    """One allocation, and its seconds: whole, and without fvcore's count and the certificate.

    The structural check is part of both.
    """
    result, seconds = timed(lambda: allocator.allocate(model, flops=f"{SHARE}%"))
    apart = {stage: result.timings[stage] for stage in APART}
    core = seconds.wall - sum(apart.values())
    return result, {"total": seconds.wall, "cpu": seconds.cpu, "core": core, **apart}


def interleaved(calls: Calls, repeats: int) -> dict[str, list[Any]]:
    """Call all in turn, `repeats` times, so that whatever else the machine does meets all of them."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(call())
    return found


def compare(name: str, repeats: int) -> Data:
    """Times of one network: ours and Torch-Pruning's single pass in turn, then its bisection to the same budget.

    The bisection is apart, since a single pass that follows eight of them finds its code in the processor's caches.

    Returns:
        Medians in seconds; where Torch-Pruning failed, why.
    """
    model = randomised(name)
    image, own = example(name), fvcore_count(model, name).flops
    row: Data = {"model": name, "own": own, "operators": len(allocator.trace(model).flow.trace.ops)}
    calls: Calls = {"ours": lambda: ours(model)[1]}
    apart: Calls = {}
    try:
        bisected = peer.prune_to_budget(model, image, own * SHARE / 100)
        row["peer"] = {"ratio": bisected.flops / own, "tries": bisected.tries, "within": bisected.within}
        row["peer"]["training"] = peer.broken_in_training(bisected.model, name)
        calls["once"] = lambda: _once(model, name)
        apart["bisected"] = lambda: timed(lambda: peer.prune_to_budget(model, image, own * SHARE / 100))[1]._asdict()
    except Exception as error:  # whatever the peer raises is a result here
        row["peer"] = {"failed": peer.reason(error)}
    result, _ = ours(model)
    row["ratio"] = result.flops_after / own
    for tool, found in {**interleaved(calls, repeats), **interleaved(apart, repeats)}.items():
        row[tool] = {key: median([each[key] for each in found]) for key in found[0]}
    return row


def _once(model: Any, name: str) -> dict[str, float]:
    """Seconds of one pass of Torch-Pruning; the copy that it changes is made beforehand."""
    scratch, image = copy.deepcopy(model), example(name)
    return timed(lambda: peer.prune_once(scratch, image))[1]._asdict()


def scaling(name: str, repeats: int) -> Data:
    """Times of one network by both tools, to be divided by its number of traced operators."""
    model = randomised(name)
    row: Data = {"model": name, "operators": len(allocator.trace(model).flow.trace.ops)}
    ours(model)
    calls: Calls = {"ours": lambda: ours(model)[1], "once": lambda: _once(model, name)}
    for tool, found in interleaved(calls, repeats).items():
        row[tool] = {key: median([each[key] for each in found]) for key in found[0]}
    return row


def memory_row(name: str) -> Data:
    """Peak memory of one network, per measurement; see `benchmarks.memory`."""
    return {"model": name, **{what: memory.measure(name, what) for what in memory.WHAT}}


def measured(parts: Sequence[str], models: Sequence[str], repeats: int) -> Iterator[tuple[str, Data]]:
    """(part, row) of the parts asked for, each as soon as it is measured."""
    peer.prune_once(randomised(memory.WARM_UP), example(memory.WARM_UP))
    ours(randomised(memory.WARM_UP))
    rows: dict[str, Callable[[str], Data]] = {
        "compare": lambda name: compare(name, repeats),
        "memory": memory_row,
        "stages": lambda name: {"model": name, "seconds": stages(name, repeats)},
    }
    for part in parts:
        if part == "scaling":
            for family, names in FAMILIES.items():
                yield from ((part, {"family": family, **scaling(name, repeats)}) for name in names)
        else:
            yield from ((part, rows[part](name)) for name in models)


def with_row(part: Data, row: Data, repeats: int, on: dict[str, str]) -> Data:
    """A part with this row in place of what there was of its model, in the order of the reference set.

    Rows of other versions, of another machine or over another number of calls are left out.
    """
    conditions = {**part.get("environment", {}), "load": on["load"], "repeats": part.get("repeats")}
    kept = part["rows"] if conditions == {**on, "repeats": repeats} else []
    rows = {each["model"]: each for each in (*kept, row)}
    names = [name for name in REFERENCE_SET if name in rows]
    ordered = [rows[name] for name in dict.fromkeys([*names, *rows])]
    return {"environment": on, "repeats": repeats, "rows": ordered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write after every row, so that what was stopped goes on with the models that are left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--models", nargs="+", default=list(REFERENCE_SET), help="names as for allocator.build")
    parser.add_argument("--repeats", type=int, default=5, help="calls that a median is taken over (default 5)")
    parser.add_argument("--print", action="store_true", help="show the tables, write nothing")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    data: Data = {} if chosen.print else read("speed")
    environments = {part: environment() for part in chosen.parts}
    for part, row in measured(chosen.parts, chosen.models, chosen.repeats):
        data[part] = with_row(data.get(part, {}), row, chosen.repeats, environments[part])
        print(f"{part}: {row['model']}", flush=True)
        if not chosen.print:
            data = {name: data[name] for name in PARTS if name in data}
            write("speed", data, markdown(data))
    if chosen.print:
        print(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
