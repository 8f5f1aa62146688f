"""The pictures of ``docs/training.md``: ``python -m tests.tools.pictures`` draws them again."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tests.support.scenes import labelled
from unet_core.config.train import AugmentConfig
from unet_core.synthetic import nuclei
from unet_core.training.augment import augment
from unet_core.training.boundary import boundary_term, objects_of
from unet_core.training.crops import CropShape, draw

DOCS = Path(__file__).parents[2] / "docs"
SIDE = 160
NOTHING = AugmentConfig(
    flips=False, quarter_turns=False, rotation=0, scale=1, elastic=0, contrast=0, brightness=0,
    gamma=1, color=0, noise=0,
)  # fmt: skip
KINDS = {
    "as it is": {},
    "flips": {"flips": True},
    "quarter_turns": {"quarter_turns": True},
    "rotation = 45": {"rotation": 45},
    "scale = 1.5": {"scale": 1.5},
    "elastic = 10": {"elastic": 10},
    "contrast = 0.6": {"contrast": 0.6},
    "brightness = 0.4": {"brightness": 0.4},
    "gamma = 2.5": {"gamma": 2.5},
    "color = 0.5 (channels apart)": {"color": 0.5},
    "noise = 0.2": {"noise": 0.2},
    "all of them": {"flips": True, "quarter_turns": True, "rotation": 45, "scale": 1.5,
                    "elastic": 10, "contrast": 0.3, "brightness": 0.1, "gamma": 1.4, "noise": 0.1},
}  # fmt: skip


def augmentations():
    """One image under each augmentation, the labels' outline and the weights moving along."""
    gray, mask = nuclei(SIDE, SIDE, np.random.default_rng(12))
    figure = Figure(figsize=(12, 9.4), layout="constrained")
    for axes, (name, options) in zip(figure.subplots(3, 4).ravel(), KINDS.items(), strict=True):
        config = NOTHING.model_copy(update=options)
        shape = CropShape.of(SIDE, 0, config)
        pixels = gray.astype(np.float32) / np.percentile(gray, 99.8)
        image = labelled(np.stack([pixels] * 3) if "color" in options else pixels, mask)
        tries = [
            augment([draw(image, shape, config, (seed, 0, 0))], shape, torch.device("cpu"))
            for seed in range(3 if name == "flips" else 12)
        ]
        made = max(tries, key=lambda t: (t.images_NCHW[0, 0] - torch.tensor(pixels)).abs().mean())
        shown = made.images_NCHW[0].permute(1, 2, 0).clamp(0, 1).numpy()
        axes.imshow(shown if shown.shape[2] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
        axes.contour(made.labels_NHW[0].numpy(), levels=[0.5], colors="tab:orange", linewidths=1)
        axes.set_title(name, fontsize=11)
        axes.axis("off")
    return figure


def weight_maps():
    """The boundary term of three scenes."""
    _, mask = nuclei(140, 140, np.random.default_rng(12))
    y, x = np.mgrid[:140, :140]
    discs = sum((np.hypot(y - 45, x - c) < 22) * n for n, c in enumerate((35, 84), start=1))
    discs += (np.hypot(y - 104, x - 58) < 28) * (discs == 0) * 3
    halves = np.zeros((140, 140), int)
    halves[20:120, 20:70], halves[20:120, 70:120] = 1, 2
    scenes = {
        "connected components of a mask": objects_of(mask, 255),
        "object ids, narrow gaps": discs,
        "object ids that touch": halves,
    }
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, (name, objects) in zip(figure.subplots(1, 3), scenes.items(), strict=True):
        shown = axes.imshow(10 * boundary_term(objects, 5.0), cmap="magma", vmin=0, vmax=10)
        for number in range(1, objects.max() + 1):
            axes.contour(objects == number, levels=[0.5], colors="white", linewidths=0.7)
        axes.set_title(name, fontsize=11)
        axes.axis("off")
    figure.colorbar(shown, ax=figure.axes, label="w0 · exp(−(d1 + d2)² / 2σ²),  w0 = 10, σ = 5 px")
    return figure


def save(figure, name):
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(70)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(256).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    save(augmentations(), "augmentations.png")
    save(weight_maps(), "weight_map.png")
