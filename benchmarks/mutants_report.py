"""The page of `benchmarks.mutants`: how many mutants of each file the tests catch, and why the others live."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from .common import ROOT, environment, table, write

REASONS = Path(__file__).with_name("mutants_survivors.json")


def write_page(data: dict[str, Any]) -> None:
    """Write the result as JSON and as Markdown."""
    write("mutants", data, page(data))


def page(data: dict[str, Any]) -> str:
    """The result as Markdown."""
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.exists() else {}
    rows = list(data["mutants"].values())
    lines, figures = [], []
    for file in sorted({row["file"] for row in rows}):
        own = [row for row in rows if row["file"] == file]
        caught = sum(row["caught"] for row in own)
        figures.append((f"`{file}`", data["places"][file], len(own), caught, f"{caught / len(own):.0%}"))
        lives = [row for row in own if not row["caught"]]
        if lives:
            lines += ["", f"### {file}", ""]
        for row in lives:
            why = reasons.get(f"{row['file']} {row['old']} -> {row['new']}", "no test yet")
            lines.append(f"- line {row['line']}: `{row['old']}` became `{row['new']}`: {why}")
    total, caught = len(rows), sum(row["caught"] for row in rows)
    places = sum(data["places"][file] for file in {row["file"] for row in rows})
    figures.append(("together", places, total, caught, f"{caught / total:.1%}"))
    versions = environment()
    return "\n".join(
        [
            "# Mutants",
            "",
            "Made by `python -m benchmarks.mutants`, which says how. "
            f"Python {versions['python']}, torch {versions['torch']}; seed {data['seed']}; code of commit {_commit()}.",
            "",
            "Is a test told when the proof itself is wrong? cosmic-ray's operators change one line: `<` becomes `<=`,",
            "`and` `or`, `1` `2`, `+` any other, a loop does not run, a condition gets a `not`. The tests that execute",
            "the line are run, those that are about the file first. Not counted are types, text in f-strings,",
            "`strict=` of zip and `frozen=` of a dataclass.",
            "",
            table(("file", "places", "tried", "caught", "share"), figures),
            "",
            "## Survivors",
            *(lines or ["", "None."]),
        ]
    )


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
