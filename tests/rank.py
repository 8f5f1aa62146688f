"""One rank of a DDP group without Ray: ``python -m tests.rank RANK RANKS MEETING CONFIG [WHEN]``.

WHEN the process kills itself: after so many steps, or ``STAGE:N``, the N-th time it gets there.
"""

import os
import signal
import sys
from pathlib import Path

from torch import distributed

from tests.dying_driver import die_at
from unet_core.fit import Step, fit
from unet_core.storage.store import Store
from unet_core.train_config import TrainConfig

STAGES = {
    "history": lambda name: name.startswith("history"),
    "checkpoint": lambda name: name.startswith("checkpoints"),
    "best": lambda name: name == "best.safetensors",
    "manifest": lambda name: name.startswith("manifest"),
    "success": lambda name: name == "_SUCCESS",
}


def main(rank, ranks, meeting, path, when=""):
    stage, _, number = when.partition(":")
    if stage == "inside":  # a publication: its temporary file is left behind
        die_at(os, "replace", lambda *_: True, int(number))
    elif number:
        die_at(Store, "publish", lambda _, name, *__: STAGES[stage](name), int(number))
    if int(ranks) > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(ranks)
        )
    taken = 0
    for event in fit(TrainConfig.model_validate_json(Path(path).read_text())):
        taken += isinstance(event, Step)
        if isinstance(event, Step) and str(taken) == when:
            os.kill(os.getpid(), signal.SIGKILL)
    if int(ranks) > 1:
        distributed.barrier()  # who leaves early cuts the others off
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
