"""One unattended pass over everything that a GPU has to tell about this project.

``python -m tests.tools.gpu_day [SECTION ...] [--out DIR]``, from a clone, on a machine with a GPU;
``--device cpu --tiny`` is a dry run for a machine without one. Figures go into ``gpu_day.json`` in
DIR as soon as they are there. A measurement that fails is recorded and the rest goes on; what
needs a GPU, time or a library that is not there is skipped by name.
"""
