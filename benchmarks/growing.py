"""Every network of the reference set, the recipes and some transformers, made wider and brought back.

python -m benchmarks.growing                                  # writes results/growing.json and growing.md
python -m benchmarks.growing --models torchvision:resnet50 --print    # one network, nothing written
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from . import memory
from .common import environment, table, timed, where, write

from reference_set import REFERENCE_SET, example, randomised  # isort: skip
from test_widening import added_neurons, same_bits  # isort: skip

import allocator
from allocator.errors import plural

Row = dict[str, Any]
RECIPES = (
    "recipe:scalenet-small",
    "recipe:resnet-small",
    "recipe:se-resnet-small",
    "recipe:resnext-small",
    "recipe:res2net-small",
)
SEEDS = ("torchvision:googlenet", "timm:hrnet_w18_small", "timm:res2net50_26w_4s")
MEMORY = ("torchvision:resnet50", "torchvision:densenet121")


def vision_transformer() -> tuple[nn.Module, torch.Tensor]:
    """timm's smallest of 12 blocks."""
    return allocator.build("timm:vit_tiny_patch16_224").eval(), torch.zeros(1, 3, 224, 224)


def swin() -> tuple[nn.Module, torch.Tensor]:
    """timm's smallest, with windows that are shifted."""
    return allocator.build("timm:swin_tiny_patch4_window7_224").eval(), torch.zeros(1, 3, 224, 224)


def convnext() -> tuple[nn.Module, torch.Tensor]:
    """timm's smallest, with a layer norm over channels in every block."""
    return allocator.build("timm:convnext_atto").eval(), torch.zeros(1, 3, 224, 224)


def llama() -> tuple[nn.Module, torch.Tensor]:
    """A small Llama with grouped queries."""
    import transformers

    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
    return transformers.LlamaForCausalLM(config).eval(), torch.arange(16).reshape(1, 16)


OTHERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "timm:vit_tiny_patch16_224": vision_transformer,
    "timm:swin_tiny_patch4_window7_224": swin,
    "timm:convnext_atto": convnext,
    "Llama, 4 blocks of 128": llama,
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and an input of its size."""
    torch.manual_seed(0)
    if name in OTHERS:
        return OTHERS[name]()
    if name.startswith("recipe:") and name.endswith("-small"):
        return allocator.build(name).eval(), torch.zeros(1, 1, 32, 32)
    return randomised(name), example(name)


def widened(name: str, init: Any, asked: dict[str, Any]) -> Row:
    """One network made wider, with what its certificate says; with init "zero" also whether the original came back."""
    model, inputs = built(name)
    row: Row = {"model": name, "init": init, "asked": " ".join(f"{key}={value}" for key, value in asked.items())}
    try:
        result, seconds = timed(lambda: allocator.widen(model, init=init, example_inputs=inputs, **asked))
    except allocator.AllocatorError as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}
    certificate = result.certificate
    row |= {"flops": [result.flops_before, result.flops_after], "seconds": seconds.cpu}
    row |= {"ok": certificate.ok, "error": certificate.relative_error, "dtype": certificate.dtype}
    row["notes"] = [note for note in result.notes if "not widened" in note or "as wide as" in note]
    if init == "zero":
        row["back"] = came_back(model, result, inputs)
    return row


def came_back(model: nn.Module, result: allocator.Result, inputs: torch.Tensor) -> bool:
    """Whether an allocation under the original's budgets gives the original bit for bit, as nothing reads the rest.

    One of parameters too, since what runs in train mode only (GoogLeNet's auxiliary heads) costs no FLOPs.
    """
    graph = allocator.trace(result.model, inputs, norms="loose")
    worth = np.where(added_neurons(result, graph), 0.0, 1.0)
    how: dict[str, Any] = {"policy": "global", "norms": "loose", "example_inputs": inputs, "certify": False}
    own = sum(parameter.numel() for parameter in model.parameters())
    again = allocator.allocate(result.model, flops=result.flops_before, params=own, criterion=worth, **how)
    shapes = [tensor.shape for tensor in again.model.state_dict().values()]
    same = shapes == [tensor.shape for tensor in model.state_dict().values()]
    return same and same_bits(again.model, model)


def seeded(name: str) -> Row:
    """The whole way of a seed in three calls, but for the training."""
    model, inputs = built(name)
    seed, seconds = timed(lambda: allocator.seed(model, "150%", example_inputs=inputs, weights="reset"))
    rule: dict[str, Any] = {"criterion": "random", "policy": "per_block", "scope": "all", "weights": "reset"}
    learned = allocator.allocate(seed.model, flops=seed.flops_before, example_inputs=inputs, **rule)
    figures = [seed.flops_before, seed.flops_after, learned.flops_after]
    return {"model": name, "flops": figures, "ok": seed.certificate.ok, "seconds": seconds.cpu}


def measure(names: list[str]) -> dict[str, Any]:
    """All rows."""
    rows: list[Row] = []
    for name in names:
        twice = [{"factor": 2}] if name in (*RECIPES, *OTHERS) else []  # at 224 pixels one of the two has to do
        for asked in ({"flops": "130%"}, *twice):
            for init in ("zero", "copy"):
                rows.append(widened(name, init, asked))
                print(rows[-1], flush=True)
    seeds = [seeded(name) for name in SEEDS if name in names]
    peaks = {name: memory.measure(name, "widen") for name in MEMORY if name in names}
    return {"rows": rows, "seeds": seeds, "memory": peaks, "environment": environment()}


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    return "\n\n".join([_INTRODUCTION, _widened(data["rows"]), _SEEDS, _seeds(data["seeds"]), *_memory(data["memory"]),
                        where(data["environment"])])  # fmt: skip


_INTRODUCTION = """# Wider networks

Made by `python -m benchmarks.growing`.

Each network at 130 % of its FLOPs, the recipes and transformers also with every layer twice as wide, by both ways to
fill what is added. *Error* is the certificate's, in float64; *back*: an allocation of the wider network under the
original's FLOPs and parameters, by scores of zero for what was added, is the original bit for bit. Seconds
are of one CPU thread, and on a machine that had other work."""

_SEEDS = """## Seeds

`seed(model, "150%")` gives each branch half as many more as the widest of its block; `allocate`, block by block,
goes back to the FLOPs of the original (by random scores here, as nothing was trained)."""


def _widened(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        start = [row["model"], row["asked"], row["init"]]
        if "failed" in row:
            lines.append([*start, row["failed"], "", "", ""])
            continue
        before, after = row["flops"]
        came = {None: "", True: "yes", False: "no"}[row.get("back")]
        lines.append([*start, f"{after / before:.3f}", f"{row['error']:.1e}", came, f"{row['seconds']:.1f}"])
    passed = sum(row.get("ok", False) for row in rows)
    back = [row["back"] for row in rows if "back" in row]
    head = ["network", "asked", "init", "FLOPs of its own", "error", "back", "seconds"]
    said = f"{passed} of {plural(len(rows), 'result')} hold their certificate; {sum(back)} of {len(back)} came back."
    return f"{said}\n\n{table(head, lines)}"


def _seeds(rows: list[Row]) -> str:
    lines = [[row["model"], *(f"{flops:,}" for flops in row["flops"]), f"{row['seconds']:.1f}"] for row in rows]
    return table(["network", "FLOPs", "of the seed", "of what is allocated", "seconds of the seed"], lines)


def _memory(peaks: dict[str, Any]) -> list[str]:
    lines = [
        [name, f"{each['made'] / 2**20:.0f}", f"{each['peak'] / each['made']:.2f}"]
        for name, each in peaks.items()
        if isinstance(each, dict)
    ]
    said = "The most that is resident beside the original while every layer becomes 1.5 times as wide, with the result."
    return ["## Memory", said, table(["network", "MiB of the wider network", "peak, times that"], lines)]


def main() -> int:
    """Measure and write; 1 where a certificate fails or a budget is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growing", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*RECIPES, *OTHERS, *REFERENCE_SET])
    parser.add_argument("--print", action="store_true", help="show the page instead of writing it")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    data = measure(chosen.models)
    if chosen.print:
        print(markdown(data))
    else:
        write("growing", data, markdown(data))
    return int(not all(row.get("ok") for row in data["rows"]))


if __name__ == "__main__":
    sys.exit(main())
