"""A driver that dies on cue: ``python -m tests.support.dying_driver STAGE SIGNAL CONFIG.toml``.

STAGE is where the process sends itself the signal of that number.
"""

import os
import signal
import sys

from jobs.cli import main
from unet_core.inference.engine import Engine
from unet_core.storage.store import Store


def die_at(n, owner, name, is_there=lambda *_: True, number=signal.SIGKILL):
    """Wrap ``owner.name``: on the n-th call for which ``is_there`` holds, die before it."""
    original = getattr(owner, name)
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += is_there(*args)
        if count == n:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def before(folder):
    """That a file of this folder is about to be published."""
    return lambda _, name, *__: name.startswith(folder)


STAGES = {
    "device": (3, Engine, "run"),
    "between masks and metrics": (3, Store, "publish_exclusively", before("metrics")),
    "inside a publication": (5, os, "link"),
    "before the manifest": (1, Store, "publish_exclusively", before("manifest")),
}

if __name__ == "__main__":
    stage, number, *sys.argv[1:] = sys.argv[1], int(sys.argv[2]), "predict", *sys.argv[3:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs us behind
    die_at(*STAGES[stage], number=number)
    main()
