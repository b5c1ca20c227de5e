"""Models of Hugging Face transformers and diffusers, as built from small configurations, and one of 8 billion numbers.

python -m benchmarks.hugging_face    # needs pip install 'neuron-allocator[language]'; takes some minutes

Writes results/hugging_face.json and .md; a run that was cut off goes on with the models that have no row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

from torch import nn

import allocator

from .common import ROOT, environment, read, table, where, write
from .hugging_face_models import DIFFUSERS, TRANSFORMERS, tiny
from .large import planned
from .memory import MALLOC, resident
from .peer import reason

Row = dict[str, Any]
LARGE = "Llama-3-8B"


def llama_8b() -> nn.Module:
    """With the sizes of Llama 3 of 8 billion parameters (its published config.json)."""
    import transformers

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=128256, max_position_embeddings=8192, **sizes, **heads)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def cut(name: str) -> Row:
    """What can go of a small model, the least that is reachable, and whether a configuration says one width."""
    start = time.process_time()
    row: Row = {}
    try:
        model, inputs = tiny(name)
        result = allocator.allocate(model, "70%", example_inputs=inputs)
    except Exception as error:  # whatever the model's own code raises
        return {"refused": reason(error), "seconds": time.process_time() - start}
    row |= {"share": result.graph.share(), "achieved": result.flops_after / result.flops_before}
    row |= {"certificate": str(result.certificate), "notes": [note for note in result.notes if "stay" in note]}
    try:
        allocator.allocate(model, "0.1%", example_inputs=inputs, at_least=0)
    except allocator.BudgetError as error:
        row["least"] = (error.reachable or 0) / result.flops_before
    even = allocator.allocate(model, "70%", example_inputs=inputs, policy="uniform", fill=False)
    fields = even.allocation.attributes.get("", {})
    row["fields"] = sorted(name.removeprefix("config.") for name in fields if not name.endswith("neuron_allocator"))
    return row | {"seconds": time.process_time() - start}


def large() -> Row:
    """The one of 8 billion numbers, measured in this process."""
    warnings.simplefilter("ignore")
    import transformers  # noqa: F401  (its own import takes as long as the plan)

    planned(lambda: tiny("Llama")[0], None)  # imports and first calls
    return {**planned(llama_8b, None), "whole_memory": resident("VmHWM")}


def in_its_own_process() -> Row:
    """`large`, where nothing else takes memory."""
    command = [sys.executable, "-m", "benchmarks.hugging_face", LARGE]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    large = data["large"]
    seconds = large["trace_seconds"] + large["plan_seconds"]
    header = ["model", "at 70 %", "can go", "least FLOPs", "configuration says", "what stays beside that", "s"]
    lines = [_line(name, row) for name, row in data["rows"].items()]
    text = [
        "# Models of Hugging Face",
        "",
        "Made by `python -m benchmarks.hugging_face`. Random weights, small configurations, two layers, as built, with "
        "cache and fused attention. *Can go*: share of all written channels; those under a norm over channels stay. "
        "*Least FLOPs*: the smallest share that `at_least=0` reaches. *Configuration says*: the fields that follow "
        "with `policy='uniform', fill=False`, so that `from_pretrained` rebuilds the result; elsewhere "
        "`allocator.load('hf:folder')` does. Seconds of the CPU, for three results.",
        "",
        table(header, lines),
        "",
        f"{LARGE} ({large['parameters'] / 1e9:.2f} billion parameters, 128 tokens) on tensors without storage: traced "
        f"in {large['trace_seconds']:.1f} s, ranked by chance, planned at 60 % and the rewritten forward checked in "
        f"{large['plan_seconds']:.1f} s, together {seconds:.1f} s of one CPU; the process's peak is "
        f"{large['whole_memory'] / 2**20:,.0f} MiB, of which the plan took {large['memory'] / 2**20:,.0f}.",
        "",
        where(data["environment"]),
    ]
    return "\n".join(text)


def _line(name: str, row: Row) -> list[str]:
    seconds = f"{row['seconds']:.1f}"
    if "refused" in row:
        return [name, f"no: {row['refused']}", "", "", "", "", seconds]
    stays = "; ".join(note.split(";")[0].split(": ")[0] for note in row["notes"]) or "–"
    least = f"{100 * row['least']:.0f} %" if "least" in row else ""
    fields = ", ".join(row["fields"]) or "–"
    return [name, f"{100 * row['achieved']:.1f} %", f"{100 * row['share']:.0f} %", least, fields, stays, seconds]


def main() -> None:
    """Measure all, one after the other, and write both files."""
    if LARGE in sys.argv:
        print(json.dumps(large()))
        return
    data: dict[str, Any] = {"rows": {}, "environment": {**environment(), "transformers": version("transformers")}}
    data |= read("hugging_face")
    if "large" not in data:
        data["large"] = in_its_own_process()
    for name in (*TRANSFORMERS, *DIFFUSERS):
        if name not in data["rows"]:
            data["rows"][name] = cut(name)
            write("hugging_face", data, markdown(data))
    write("hugging_face", data, markdown(data))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
