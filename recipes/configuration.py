"""Configurations of training runs, read from YAML and checked as a whole before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allocator.disk import read_text
from allocator.errors import ConfigurationError, UnknownNameError, a_kind, as_given, did_you_mean
from allocator.recipes.contradictions import contradictions
from allocator.recipes.parsing import parse
from allocator.recipes.plain_yaml import parsed
from allocator.recipes.sections import AllocationPlan, Config, Data, Detector, Network, Running, Training

# Whoever writes a configuration in Python finds its sections here, too.
__all__ = [
    "CONFIGS",
    "AllocationPlan",
    "Config",
    "Data",
    "Detector",
    "Network",
    "Running",
    "Training",
    "config_names",
    "load_config",
]

CONFIGS = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """The configurations that are installed with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(source: str | Path | Mapping[str, Any] | Config, settings: Sequence[str] = ()) -> Config:
    """Read a configuration and check it.

    Args:
        source: a YAML file, the name of an installed one (`config_names`), or its contents.
        settings: changes to it, each of the form `section.key=value`, the value in YAML.

    Raises:
        ConfigurationError: keys or values do not fit; the message lists them all.
        UnknownNameError: neither a file nor an installed configuration.
        FileError: the file cannot be read.
    """
    if isinstance(source, Config):
        data = source.to_dict()
    elif isinstance(source, Mapping):
        data = dict(source)
    else:
        data = _read(source)
    for setting in settings:
        _set(data, setting)
    # As in other YAML formats, sections called x-... hold what others refer to.
    sections = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    problems: list[str] = []
    config = parse(Config, sections, "", problems)
    if config is not None:
        problems += contradictions(config)
    if problems or config is None:
        raise ConfigurationError("the configuration does not fit:\n  " + "\n  ".join(problems))
    return config


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not os.path.exists(path) and path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{str(source).replace('-', '_')}.yaml"
        if not os.path.exists(path):
            names = config_names()
            hint = did_you_mean(str(source), names, most=3, cutoff=0.4) or f"installed: {', '.join(names)}"
            said = as_given(str(source))
            raise UnknownNameError(f"{said} is neither a .yaml file nor an installed configuration; {hint}")
    try:
        data = parsed(read_text(path))
    except ValueError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected sections (network, data, ...), got {a_kind(data)}")
    return data


def _set(data: dict[str, Any], setting: str) -> None:
    """Put `section.key=value` into the data; `section=null` leaves a section out."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise ConfigurationError(f"{setting!r} is not of the form section.key=value")
    *sections, key = path.split(".")
    for section in sections:
        values = data.get(section)
        if values is None:
            values = {}
        elif not isinstance(values, dict):
            raise ConfigurationError(f"{setting!r}: {section} is no section")
        # A copy: sections that YAML's anchors make alike are one dict, of which only this one is to change.
        data[section] = dict(values)
        data = data[section]
    try:
        data[key] = parsed(text)
    except ValueError as error:
        raise ConfigurationError(f"{setting!r}: the value is not YAML ({error})") from error
