"""The tables of options and budgets, made from the one place that declares them."""

from __future__ import annotations

from allocator.settings import BUDGETS, CHOICES, DEFAULTS, KNOWN_POLICIES, OPTIONS


def options_table() -> str:
    """Every budget and option of an allocation: in Python and YAML, in a shell, its default, and what it decides."""
    rows = ["| option | in a shell | values | default | decides |", "| --- | --- | --- | --- | --- |"]
    for name, budget in BUDGETS.items():
        rows.append(f"| `{name}` | `--{name.replace('_', '-')}` | | `None` | a budget: {budget.help} |")
    for name, option in OPTIONS.items():
        words = KNOWN_POLICIES if name == "policy" else CHOICES.get(name, ())
        values = ", ".join(f"`{word}`" for word in words)
        flag = (option.flag or name).replace("_", "-")
        rows.append(f"| `{name}` | `--{flag}` | {values} | `{getattr(DEFAULTS, name)!r}` | {option.help} |")
    return "\n".join(rows)
