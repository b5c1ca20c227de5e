"""How much memory a recovery may take for what forwards hold."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from allocator.cost.budget import number_of
from allocator.errors import InputError, as_given
from allocator.scoring import ranks

SHARE = 0.5
"""Of what is free, where nobody says how much may be taken."""
UNKNOWN = 2**31
"""Bytes that are taken to be free where the system does not say."""
_FREE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def allowed_bytes(asked: float | str | None, device: torch.device) -> int:
    """Bytes that may be taken on a device: as asked for, else a share of what is free, over all ranks.

    Args:
        asked: a number, or text such as "2GB"; None for no wish.
        device: where the network lies.

    Raises:
        InputError: this is no number of bytes.
    """
    if asked is None:
        return int(SHARE * free_bytes(device)) // ranks.count()
    try:
        text = asked.strip().upper().removesuffix("B") if isinstance(asked, str) else asked
        number = number_of(text)
        if number < 0 or not math.isfinite(number) or str(text).endswith("%"):
            raise ValueError("no number of bytes")
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"memory={as_given(asked)} is no number of bytes, such as 2e9 or '2GB'") from None
    return int(number)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device, as far as the system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(_of_the_system(), _of_the_group()))


def _of_the_system() -> int:
    try:
        lines = _FREE.read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


def _of_the_group() -> float:
    """What a container may still take; its files in memory are given back where it needs more."""
    try:
        limit, used = ((_GROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        inside = (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        files = next(int(line.split()[1]) for line in inside if line.startswith("inactive_file "))
        return max(int(limit) - int(used) + files, 0)
    except (OSError, StopIteration, ValueError):
        return math.inf
