"""``python -m jobs`` is ``unet-jobs``."""

from jobs.cli import main

main()
