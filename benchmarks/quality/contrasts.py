"""Which differences between ways of choosing are more than noise.

Written down before any test figure was looked at: the primary contrasts are our default with data against
Torch-Pruning's best arm, and our default without data against its best arm without data, at every share and state. The
peer's best arm is picked on calibration data, at each share and state, over all networks and seeds. Differences are
paired by network and seed, of which at least six are asked for; the interval is of a bootstrap that draws networks and
then seeds of each, the chance that of a sign-flip test, corrected by Holm over all primary contrasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import permutation_test

Row = dict[str, Any]
Key = tuple[str, int]
STATES = ("cut", "statistics", "recovered", "tuned")
DATA_FREE = ("TP BN", "TP L2", "TP LAMP")
PRIMARY = (("default with data", ("TP",)), ("default", DATA_FREE))
RESAMPLES = 10_000
FEWEST = 6
"""Pairs: with fewer no sign-flip test can tell anything apart."""


@dataclass(frozen=True)
class Contrast:
    """Points of error that the peer's arm has more than ours, in the mean over networks and seeds.

    Attributes:
        share, state, ours, peer: what is compared.
        difference: in points; above zero, ours errs less.
        low, high: of the 95 % interval.
        chance: of such a difference, two-sided; corrected where several were tested.
        pairs: how many networks and seeds.
    """

    share: float
    state: str
    ours: str
    peer: str
    difference: float
    low: float
    high: float
    chance: float
    pairs: int


def errors(rows: Sequence[Row], arm: str, share: float, state: str, part: str) -> dict[Key, float]:
    """Points of error by network and seed; where an arm failed there is none."""
    name = f"{state} {part}"
    return {
        (row["network"], row["seed"]): 100 * row[name]["error"]
        for row in rows
        if row["arm"] == arm and row["asked"] == share and name in row
    }


def primary(rows: Sequence[Row]) -> list[Contrast]:
    """All primary contrasts that there are rows for, with corrected chances."""
    found = []
    for share in sorted({row["asked"] for row in rows if row["arm"] != "full"}, reverse=True):
        for state in STATES:
            for ours, prefixes in PRIMARY:
                peers = sorted({row["arm"] for row in rows if row["arm"].startswith(prefixes)})
                best = _best(rows, peers, share, state)
                if best is not None and _pairs(rows, (ours, best), share, state) >= FEWEST:
                    found.append(contrast(rows, ours, best, share, state))
    return corrected(found)


def _pairs(rows: Sequence[Row], arms: Sequence[str], share: float, state: str) -> int:
    """On how many networks and seeds all of these were measured."""
    return len(set.intersection(*(set(errors(rows, arm, share, state, "test")) for arm in arms)))


def _best(rows: Sequence[Row], arms: Sequence[str], share: float, state: str) -> str | None:
    """The arm that errs least on calibration data, of those that were measured as often as any."""
    of = {arm: errors(rows, arm, share, state, "calibration") for arm in arms}
    most = max((len(each) for each in of.values()), default=0)
    means = {arm: float(np.mean(list(each.values()))) for arm, each in of.items() if len(each) == most and most}
    return min(means, key=lambda arm: means[arm]) if means else None


def contrast(rows: Sequence[Row], ours: str, peer: str, share: float, state: str) -> Contrast:
    """One comparison on test data; its chance is not corrected."""
    mine, theirs = (errors(rows, arm, share, state, "test") for arm in (ours, peer))
    keys = sorted(mine.keys() & theirs.keys())
    differences = np.array([theirs[key] - mine[key] for key in keys])
    low, high = _interval(keys, differences)
    return Contrast(share, state, ours, peer, float(differences.mean()), low, high, sign_flip(differences), len(keys))


def sign_flip(differences: np.ndarray) -> float:
    """The chance, two-sided, of a mean so far from zero where either sign is as likely."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    test = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0)
    return float(test.pvalue)


def _interval(keys: Sequence[Key], differences: np.ndarray) -> tuple[float, float]:
    """95 % of the means that a bootstrap over networks, and seeds within each, gives."""
    random = np.random.default_rng(0)
    names = sorted({name for name, _ in keys})
    of = [differences[[key[0] == name for key in keys]] for name in names]
    means = []
    for _ in range(2_000):
        chosen = [of[i] for i in random.integers(len(of), size=len(of))]
        means.append(np.mean([random.choice(each, len(each)).mean() for each in chosen]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def corrected(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same with Holm's correction over all of them, in their order."""
    chances = holm([each.chance for each in contrasts], len(contrasts))
    return [replace(each, chance=chance) for each, chance in zip(contrasts, chances, strict=True)]


def holm(chances: Sequence[float], tests: int) -> list[float]:
    """Chances corrected by Holm for so many tests, of which some may not be there yet."""
    result, highest = list(chances), 0.0
    for rank, i in enumerate(np.argsort(chances).tolist()):
        highest = max(highest, min(1.0, (tests - rank) * chances[i]))
        result[i] = highest
    return result
