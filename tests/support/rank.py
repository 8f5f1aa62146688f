"""Ranks of a DDP group without Ray: processes that are forked from one that has torch already.

WHEN one kills itself: after so many steps, or ``STAGE:N``, the N-th time it gets there.
"""

import os
import signal
import sys

import torch
from torch import distributed

from tests.support.confined import fork_server
from tests.support.dying_driver import die_at
from unet_core.config.train import TrainConfig
from unet_core.storage.store import Store
from unet_core.training.fit import Step, fit

STAGES = {
    "history": lambda name: name.startswith("history"),
    "checkpoint": lambda name: name.startswith("checkpoints"),
    "best": lambda name: name == "best.safetensors",
    "manifest": lambda name: name.startswith("manifest"),
    "success": lambda name: name == "_SUCCESS",
}


def start(rank, ranks, meeting, config, errors, when=""):
    """A rank; what it says on standard error goes to the file ``errors``."""
    arguments = (dict(os.environ), rank, ranks, str(meeting), config.model_dump_json(
        exclude_unset=True), str(errors), when)  # fmt: skip
    process = fork_server().Process(target=main, args=arguments)
    process.start()
    return process


def main(environment, rank, ranks, meeting, config, errors, when):
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch.set_num_threads(1)
    stage, _, number = when.partition(":")
    if stage == "inside":  # a publication: its temporary file is left behind
        die_at(int(number), os, "replace")
    elif number:
        die_at(int(number), Store, "publish", lambda _, name, *__: STAGES[stage](name))
    if ranks > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks
        )
    taken = 0
    for event in fit(TrainConfig.model_validate_json(config)):
        taken += isinstance(event, Step)
        if isinstance(event, Step) and str(taken) == when:
            os.kill(os.getpid(), signal.SIGKILL)
    if ranks > 1:
        distributed.barrier()  # who leaves early cuts the others off
        distributed.destroy_process_group()
