"""Messages that speak of Python's arguments, in the words of the command line."""

from __future__ import annotations

import re

from allocator.settings import BUDGETS, CHOICES, OPTIONS

# What a message says in Python, and what the command line calls it; all that fit, in this order.
_PHRASES = (
    (r"--(trust|arch NAME) \(\w+=[\w.]+\)", r"--\1"),
    (r"pass example_inputs, for example example_inputs=[^)]+\), or in a shell --input-size", "give --input-size"),
    (r"check that model\(\*example_inputs\) runs, or pass other example_inputs", "give another --input-size"),
    (r"fresh network with model=\.\.\. \(or --arch NAME\)", "network with --arch NAME"),
    (r"\b(?:allocate|apply)\(model, allocation\)", "apply"),
    (r"\ballocate\(model, (\w+)=\.\.\.\)", r"allocator-cli allocate MODEL --\1 ..."),
    (r"pass data=loader", "give --data FOLDER, a folder of pictures or a file of a tensor"),
    (r"recover needs data: a few hundred", "--recover needs --data: a few hundred"),
    (r"pass certify=False", "--no-certificate"),
    (r"pass example_inputs that", "give an --input-size at which they"),
    (r'leave out weights="reset", or recover', "leave out --weights reset, or --recover"),
    (r"\bcertify=False\b", "--no-certificate"),
    (r"\bfill=False\b", "--no-fill"),
    (r"\bexample_inputs (do not|does not) fit", "the --input-size does not fit"),
    (r"\bexample_inputs\b", "--input-size"),
)


def in_shell(message: str) -> str:
    """A message with flags in place of keyword arguments, such as `--at-least 0` for `at_least=0`."""
    for said, flag in _PHRASES:
        message = re.sub(said, flag, message)
    return _ARGUMENT.sub(lambda found: f"{flag_of(found[1])} {found[2].strip(_QUOTES)}", message)


def flag_of(name: str) -> str:
    """How the command line names an option or a budget."""
    option = OPTIONS.get(name)
    return f"--{((option and option.flag) or name).replace('_', '-')}"


_QUOTES = "'\""
_FREE = "|".join(name for name in (*BUDGETS, *OPTIONS) if name not in CHOICES)  # others than of a few words
_ARGUMENT = re.compile(rf"\b(?=(?:{_FREE})=|\w+=['\"])({'|'.join((*BUDGETS, *OPTIONS))})=('[^']*'|\"[^\"]*\"|[\w.%*]+)")
