"""A driver that dies on cue: ``python -m tests.dying_driver STAGE N CONFIG.toml``.

STAGE is where the process kills itself with SIGKILL the N-th time that it gets there.
"""

import os
import signal
import sys

from jobs.cli import main
from unet_core.inference.engine import Engine
from unet_core.storage.store import Store


def die_at(owner, name, is_there, n):
    """Wrap ``owner.name``: on the n-th call for which ``is_there`` holds, die before it."""
    original = getattr(owner, name)
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += is_there(*args)
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


STAGES = {
    "device": lambda n: die_at(Engine, "run", lambda *_: True, n),
    "between masks and metrics": lambda n: die_at(
        Store, "publish_exclusively", lambda _, name, *__: name.startswith("metrics"), n
    ),
    "inside a publication": lambda n: die_at(os, "link", lambda *_: True, n + 2),
    "before the manifest": lambda n: die_at(
        Store, "publish_exclusively", lambda _, name, *__: name.startswith("manifest"), 1
    ),
}

if __name__ == "__main__":
    stage, count, *sys.argv[1:] = sys.argv[1], int(sys.argv[2]), "predict", *sys.argv[3:]
    STAGES[stage](count)
    main()
