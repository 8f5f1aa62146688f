"""A network whose checkpoint brings trouble along: images of certain names harm their process.

A factory runs in every process that loads the checkpoint, so the harm reaches actors and the
children in which they try images alone.
"""

import os
import signal
import time

import numpy as np
from torch import nn

from unet_core.config.presets import Factory, preset
from unet_core.images.decoder import Decoder
from unet_core.networks.unet import UNet

SPEC = Factory("tests.support.poison:network", {}, 1, 1)


def network() -> nn.Module:
    if Decoder.decode is harmless:
        Decoder.decode = harmful
    return UNet(preset("padded", in_channels=1, classes=1, width=4, depth=2))


harmless = Decoder.decode


def harmful(self, sample, on_step=lambda: None):
    if sample.failure is None:
        name = sample.key
        if "kills" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hangs" in name:
            time.sleep(3600)
        if "creeps" in name:  # slower than a limit, but never still for so long
            for _ in range(2):
                time.sleep(2.5)
                on_step()
        hoard = []
        while "eats" in name:
            hoard.append(np.empty(2**30, np.uint8))
    return harmless(self, sample, on_step)
