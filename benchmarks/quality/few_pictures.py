"""How many pictures does a choice need, and does what it saw say anything of what it did not?

A network with ImageNet weights, as in `pretrained`, is narrowed by `fisher` on crops of ever more photographs (as in
`pictures`: `--more` has those beyond the first thirty), as many crops each time; and on half of the photographs, where
the other half is the judge. `python -m benchmarks.quality.few_pictures --page` writes what was found as a page.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import allocator
from benchmarks.common import RESULTS, table

from .arms import ARMS
from .pictures import VALIDATION, by_picture, crops, find, more, split
from .pretrained import NETWORKS, SIDE, TEST_CROPS, answers, likeness
from .rows import add_row, is_known, read_rows
from .task import Part

ROWS = RESULTS / "quality_pictures.jsonl"
"""One line per network, share, choice and number of photographs, or half of them."""
PAGE = RESULTS / "quality_pictures.md"
PICTURES = (30, 60, 120, 240)
CROPS = 256
COLUMNS = {
    "cut, test": "test, as cut",
    "recovered, test": "test, recovered",
    "cut, added": "kind that was added, as cut",
    "recovered, added": "the same, recovered",
}


def chosen(model: nn.Module, arm: str, share: float, images: Tensor) -> allocator.Result:
    """The smaller network."""
    made = ARMS[arm](model, Part(images, torch.zeros(len(images), dtype=torch.long)), share)
    assert isinstance(made, allocator.Result)
    return made


def halves(model: nn.Module, arm: str, share: float, images: Tensor, pictures: int) -> dict[str, Any]:
    """What is left by one half of the pictures, on these and on the other half; the mean over which is which.

    Args:
        model: the full network.
        arm, share: how it is narrowed.
        images: crops of the pictures in turn.
        pictures: how many they are of.
    """
    first = torch.arange(len(images)) % pictures < pictures // 2
    found: dict[str, list[dict[str, float]]] = {"same pictures": [], "other pictures": []}
    for mine in (first, ~first):
        small = chosen(model, arm, share, images[mine]).model
        for name, some in (("same pictures", images[mine]), ("other pictures", images[~mine])):
            found[name].append(likeness(small, some, answers(model, some)))
    return {name: {key: sum(each[key] for each in of) / 2 for key in of[0]} for name, of in found.items()}


def curve(
    model: nn.Module, arm: str, share: float, images: Tensor, pictures: int, judges: dict[str, Tensor], *, recover: bool
) -> dict[str, Any]:
    """What is left as cut and, where asked for, recovered on the crops that chose.

    Args:
        model: the full network.
        arm, share: how it is narrowed.
        images: crops of the pictures in turn.
        pictures: how many they are of.
        judges: crops of other pictures: of the "test", and of the kind that was added ("added").
        recover: recover it too.
    """
    made = chosen(model, arm, share, images)
    smalls = {"cut": made.model}
    if recover:
        smalls["recovered"] = allocator.recover(made, by_picture(images, pictures)).model
    return {
        f"{state}, {part}": likeness(small, crops_of, answers(model, crops_of))
        for state, small in smalls.items()
        for part, crops_of in judges.items()
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    parts = [
        "# How many pictures a choice needs",
        "",
        "Made by `python -m benchmarks.quality.few_pictures`. Networks with ImageNet weights, narrowed by `fisher` "
        "without labels or training. In how many crops (128 x 128) the likeliest of 1,000 classes is still the full "
        "network's and, in brackets, how far the answers are from its (Kullback-Leibler divergence in nats). "
        "*Likeliest class alone*: `fisher` as it was before it counted the other classes too.",
        "",
        "## More pictures",
        "",
        f"Chosen, and recovered, on {CROPS} crops of so many photographs. The first 30 are of the same sources as the "
        f"{TEST_CROPS} crops of 29 others that are the test; those that were added show animals, tools, buildings and "
        f"things before white, and as many crops of {VALIDATION} others of that kind are the second judge. Good to "
        "about 5 points, as crops of one picture are alike. With the likeliest class alone, 512 were refitted on; "
        "the second judge had a say in how `fisher` counts the others.",
        "",
    ]
    lines = [
        [*_setting(row), row["pictures"], *(_figure(row.get(key)) for key in COLUMNS)]
        for row in rows
        if not row["halves"]
    ]
    parts.append(table(["network", "FLOPs", "choice", "photographs", *COLUMNS.values()], lines))
    parts += [
        "",
        "## Half of the pictures",
        "",
        "Right after the cut, on the photographs that the choice was made by, and on as many others; the mean over "
        "which half is which.",
        "",
    ]
    lines = [
        [*_setting(row), row["pictures"] // 2, row["crops"] // 2]
        + [_figure(row[key]) for key in ("same pictures", "other pictures")]
        for row in rows
        if row["halves"]
    ]
    parts.append(table(["network", "FLOPs", "choice", "photographs", "crops", "these", "others"], lines))
    return "\n".join([*parts, ""])


def _setting(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["network"], f"{row['asked']:.0%}", row["arm"]


def _figure(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{100 * found['agreement']:.1f} % ({found['divergence']:.2f})"


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page and measure nothing")
    parser.add_argument("--networks", nargs="+", default=["EfficientNet-Lite0"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9])
    parser.add_argument("--arm", default="fisher")
    parser.add_argument("--pictures", type=Path, help="as for `pretrained`")
    parser.add_argument("--more", type=Path, help="a folder of more, for calibration alone")
    parser.add_argument("--recover", nargs="*", type=int, default=list(PICTURES), help="for so many photographs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not args.page:
        _measure(args)
    PAGE.write_text(markdown(read_rows(ROWS)), encoding="utf-8")


def _measure(args: argparse.Namespace) -> None:
    parts = split(find(args.pictures))
    if args.more is not None:
        parts.update(more(args.more, parts))
    judges = {"test": crops(parts["test"], SIDE, TEST_CROPS, 1)}
    if args.more is not None:
        judges["added"] = crops(parts["validation"], SIDE, TEST_CROPS, 3)
    for name in args.networks:
        model = NETWORKS[name]()
        for share in args.shares:
            key = {"network": name, "asked": share, "arm": args.arm, "crops": CROPS}
            for count in PICTURES:
                pictures = parts["calibration"][:count]
                each = {**key, "pictures": len(pictures), "halves": False}
                if len(pictures) == count and not is_known(ROWS, **each):
                    images, recover = crops(pictures, SIDE, CROPS, 0), count in args.recover
                    found = curve(model, args.arm, share, images, count, judges, recover=recover)
                    add_row(ROWS, found, **each)
            pictures = parts["calibration"][: PICTURES[0]]
            each = {**key, "pictures": len(pictures), "halves": True}
            if not is_known(ROWS, **each):
                images = crops(pictures, SIDE, CROPS, 0)
                add_row(ROWS, halves(model, args.arm, share, images, len(pictures)), **each)


if __name__ == "__main__":
    main()
