"""The network on its way: weights, optimiser, running mean; one step, and all of it as tensors."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unet_core.config.presets import UNetSpec
from unet_core.config.train import FitConfig, TrainConfig
from unet_core.errors import CheckpointError, ConfigError, one_line
from unet_core.inference.engine import memory_format
from unet_core.networks import checkpoint
from unet_core.networks.construction import build, header_of
from unet_core.networks.header import Header
from unet_core.tiling.geometry import Sides
from unet_core.training.augment import Examples
from unet_core.training.losses import BatchCounts, Loss
from unet_core.training.ranks import Ranks


class StepResult(NamedTuple):
    """What one rank saw of an optimiser step."""

    image_ids: list[list[str]]
    losses: list[float]
    """Its part of the loss; both by piece."""
    is_finite: bool
    """Whether the gradient is, on every rank alike; if not, the weights stay as they are."""


class Learner:
    """A network with its optimiser, the same on every rank."""

    def __init__(
        self, network: nn.Module, loss: Loss, config: FitConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self.loss, self._ranks = config, loss, ranks
        self.device = device
        if ranks.count > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # torch has no types for these
        self.network = network.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]  # stub lacks the pair
        norms = (m for m in self.network.modules() if isinstance(m, _BatchNorm))
        self._frozen = list(norms) if config.freeze_norm else []
        for norm in self._frozen:
            norm.requires_grad_(False)
        if config.compile:
            self.network.compile()
        self._parallel = self.network if ranks.count == 1 else DistributedDataParallel(self.network)
        self._optimizer = _optimizer(self.network, config)
        self._mean: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self._mean = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self._autocast = precision(config, device)

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and kept: the running mean, if there is one."""
        return self._mean.module if self._mean is not None else self.network

    def step(
        self, pieces: Sequence[Examples], counts: BatchCounts, rate: float, seed: int
    ) -> StepResult:
        """Take one optimiser step, unless the gradient is not finite.

        ``seed``: of dropout; of the run, the step and the rank, so that nothing need be kept.
        """
        torch.manual_seed(seed)
        self.network.train()
        for norm in self._frozen:
            norm.eval()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        parts = [self._backward(p, counts, n == len(pieces)) for n, p in enumerate(pieces, 1)]
        longest = self._config.clip_norm or math.inf
        length = nn.utils.clip_grad_norm_(self.network.parameters(), longest)
        is_finite = bool(length.isfinite())
        if is_finite:
            self._optimizer.step()
            if self._mean is not None:
                self._mean.update_parameters(self.network)
        ids = [piece.image_ids for piece in pieces]
        return StepResult(ids, [part.item() for part in parts], is_finite)

    def _backward(self, piece: Examples, counts: BatchCounts, is_last: bool) -> Tensor:
        """Add a piece's gradient; ranks exchange theirs with the last one."""
        if isinstance(self._parallel, DistributedDataParallel):
            self._parallel.require_backward_grad_sync = is_last
        # ranks with and without images exchange statistics of BatchNorm in one precision
        is_low = self._autocast is not None and len(piece.image_ids) > 0
        with torch.autocast(self.device.type, self._autocast, enabled=is_low):
            logits_NKHW = self._parallel(piece.images_NCHW)
        part = self.loss.part(logits_NKHW, piece, counts)
        (part * self._ranks.count).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean
        return part.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that another process needs to go on, by name, on the CPU."""
        found = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        if self._mean is not None:
            found |= {f"mean.{name}": t for name, t in self._mean.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": torch.as_tensor(v) for name, v in state.items()}
        return {name: t.detach().cpu().clone().contiguous() for name, t in found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where ``tensors`` were taken; raises CheckpointError if they do not fit."""
        parts, state = defaultdict[str, Any](dict), defaultdict[int, Any](dict)
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        for name, tensor in parts["optimiser"].items():
            index, _, key = name.partition(".")
            state[int(index)][key] = tensor
        try:
            self.network.load_state_dict(parts["network"])
            if self._mean is not None:
                self._mean.load_state_dict(parts["mean"])
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        except (RuntimeError, ValueError) as error:
            reason = f"the checkpoint does not fit this network: {one_line(error)}"
            raise CheckpointError(reason) from error
        for weight, kept in self._optimizer.state.items():
            for name, tensor in kept.items():
                if tensor.shape == weight.shape:  # laid out as before: a fused step relies on it
                    kept[name] = torch.empty_like(weight).copy_(tensor)


def _optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    # elsewhere torch has something fast by itself; gaps in memory are no matter to the other way
    fused = True if all(p.device.type == "cpu" and _is_dense(p) for p in weights) else None
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=config.momentum),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return kinds[config.optimiser](weights, lr=rate, weight_decay=decay, fused=fused)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def rate_at(step: int, steps: int, config: FitConfig) -> float:
    """The learning rate of a step: a linear warm-up, then the schedule down to zero at the end."""
    warm = round(steps * config.warmup)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * factor[config.schedule]


def precision(config: FitConfig, device: torch.device) -> torch.dtype | None:
    """What activations are computed in, if not in float32."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    wants = config.precision == "bfloat16" or (config.precision == "auto" and has_it)
    return torch.bfloat16 if wants else None


def new_network(config: TrainConfig) -> tuple[nn.Module, Header]:
    """A network with initial weights, or with those of ``model.checkpoint``; the same for the same
    seed.

    Raises ConfigError for classes or a crop that it cannot give.
    """
    torch.manual_seed(config.train.seed)
    model = config.model
    if model.checkpoint:
        network, header = _loaded(config)
    else:
        network = build(model.spec)
        header = header_of(network, model.spec, model)
    crop, tiling = config.train.crop, header.tiling
    crops = Sides(tiling.sides.smallest - 2 * tiling.margin, tiling.sides.step)
    if crop not in crops:
        raise ConfigError(f"train.crop: {crop} is not possible here; {crops.near(crop)}")
    weights = config.loss.class_weights
    if isinstance(weights, list) and len(weights) != len(header.class_names):
        raise ConfigError(
            f"loss.class_weights holds {len(weights)} numbers, but the classes are "
            f"{', '.join(header.class_names)}"
        )
    return network, header


def _loaded(config: TrainConfig) -> tuple[nn.Module, Header]:
    """Somebody's weights; where other classes are named, the last layer begins anew."""
    model = config.model
    network, header = checkpoint.load(
        model.checkpoint, storage=config.storage, factory=model.factory
    )
    header = replace(header, training={})
    names = tuple(model.classes)
    if "classes" not in model.model_fields_set or names == header.class_names:
        return network, header
    if len(names) == len(header.class_names):
        return network, replace(header, class_names=names)
    if not isinstance(header.network, UNetSpec):
        raise ConfigError(
            f"model.classes names {len(names)}, but {model.checkpoint} has "
            f"{len(header.class_names)}, and only U-Nets of presets get a new last layer"
        )
    spec = replace(header.network, classes=1 if len(names) == 2 else len(names))
    wider, kept = build(spec), network.state_dict()
    fitting = {n: kept[n] for n, t in wider.state_dict().items() if kept[n].shape == t.shape}
    wider.load_state_dict(fitting, strict=False)
    return wider, replace(header, network=spec, class_names=names, palette=())
