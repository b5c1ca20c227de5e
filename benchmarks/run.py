"""All benchmarks, one after the other; `make bench`.

python -m benchmarks.run
"""

from __future__ import annotations

import sys

from . import budgets, speed


def main() -> int:
    """Run them all; 1 where one of them found a broken promise."""
    return max(speed.main([]), budgets.main([]))


if __name__ == "__main__":
    sys.exit(main())
