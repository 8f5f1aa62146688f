"""One rank of a DDP group without Ray: ``python -m tests.rank RANK RANKS MEETING CONFIG.toml …``.

With ``die=STEP`` among the overrides the process kills itself after so many steps; with
``die=STAGE:N`` the N-th time that it gets there.
"""

import os
import signal
import sys

from torch import distributed

from tests.dying_driver import die_at
from unet_core.config import load
from unet_core.fit import Step, fit
from unet_core.store import Store
from unet_core.train_config import TrainConfig

STAGES = {
    "history": lambda name: name.startswith("history"),
    "checkpoint": lambda name: name.startswith("checkpoints"),
    "best": lambda name: name == "best.safetensors",
    "manifest": lambda name: name.startswith("manifest"),
    "success": lambda name: name == "_SUCCESS",
}


def main(rank, ranks, meeting, path, *overrides):
    dies = [o.removeprefix("die=") for o in overrides if o.startswith("die=")]
    steps = {int(at) for at in dies if at.isdigit()}
    for stage, _, number in (at.partition(":") for at in dies if not at.isdigit()):
        die_at(Store, "publish", lambda _, name, *__, s=stage: STAGES[s](name), int(number))
    if int(ranks) > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(ranks)
        )
    config = load(TrainConfig, path, [o for o in overrides if not o.startswith("die=")])
    taken = 0
    for event in fit(config):
        taken += isinstance(event, Step)
        if isinstance(event, Step) and taken in steps:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
