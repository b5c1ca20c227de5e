"""A tiny run under torchrun: `training_ranks.py FOLDER [dies|hangs|looks]`.

Rank 1 dies or hangs in its fifth update; or each looks at its share of the images to choose the neurons.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from training_runs import looking_config, tiny_config

from allocator.recipes.run import train
from allocator.recipes.training import Fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, fate = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    rank = int(os.environ["RANK"])
    plain = Fit._update

    def update(fit: Fit, chunks: Any) -> None:
        if fit.step == 4 and rank == 1 and fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fit.step == 4 and rank == 1 and fate == "hangs":
            time.sleep(600)
        plain(fit, chunks)

    setattr(Fit, "_update", update)  # noqa: B010
    config = looking_config(folder) if fate == "looks" else tiny_config(folder)
    config["run"]["timeout"] = 20.0
    result = train(config, progress=False)
    assert result.allocation is not None
    facts = {"kept": result.allocation.kept, "stages": [stage.test_accuracy for stage in result.stages]}
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))
