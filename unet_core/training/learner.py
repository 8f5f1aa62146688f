"""Network and optimizer: one optimizer step, and their state as tensors for checkpoints."""

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
from unet_core.training.augment import MicroBatch
from unet_core.training.losses import BatchCounts, Loss
from unet_core.training.ranks import Ranks


class StepResult(NamedTuple):
    """Result of an optimizer step on one rank."""

    image_ids: list[list[str]]
    """Image ids of each micro-batch."""
    losses: list[float]
    """Share of each micro-batch in the loss of the global batch."""
    is_finite: bool
    """True if the gradient was finite, on all ranks alike; if not, the weights are unchanged
    (BatchNorm's running statistics are not), and training ends."""


class Learner:
    """A network with its optimizer and EMA weights, kept equal on all ranks by DDP."""

    def __init__(
        self, network: nn.Module, loss: Loss, config: FitConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self.loss, self._ranks = config, loss, ranks
        self.device = device
        if ranks.world_size > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # untyped in torch
        self.network = network.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]  # stub lacks the pair
        self._frozen = [
            m for m in self.network.modules() if config.freeze_norm and isinstance(m, _BatchNorm)
        ]
        for norm in self._frozen:
            norm.requires_grad_(False)
        if config.compile:
            self.network.compile()
        self._ddp = self.network if ranks.world_size == 1 else DistributedDataParallel(self.network)
        self._optimizer = _optimizer(self.network, config)
        self._ema: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self._ema = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self._autocast = autocast_dtype(config, device)

    @property
    def eval_network(self) -> nn.Module:
        """The network that is validated and published: with EMA weights if ``train.ema`` is set."""
        return self._ema.module if self._ema is not None else self.network

    def step(
        self, micro_batches: Sequence[MicroBatch], counts: BatchCounts, rate: float, seed: int
    ) -> StepResult:
        """Take one optimizer step, unless the gradient is not finite.

        ``counts`` are those of the global batch, ``rate`` is the learning rate, ``seed`` that of
        dropout: derived from the step and the rank, so checkpoints need no random state.
        """
        torch.manual_seed(seed)
        self.network.train()
        for norm in self._frozen:
            norm.eval()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        losses = [
            self._backward(micro_batch, counts, number == len(micro_batches))
            for number, micro_batch in enumerate(micro_batches, start=1)
        ]
        gradient_norm = nn.utils.clip_grad_norm_(
            self.network.parameters(), self._config.clip_norm or math.inf
        )
        is_finite = bool(gradient_norm.isfinite())
        if is_finite:
            self._optimizer.step()
            if self._ema is not None:
                self._ema.update_parameters(self.network)
        return StepResult(
            [b.image_ids for b in micro_batches], [loss.item() for loss in losses], is_finite
        )

    def _backward(self, micro_batch: MicroBatch, counts: BatchCounts, is_last: bool) -> Tensor:
        """Accumulate a micro-batch's gradient and return its loss, a scalar.

        The backward pass of the last micro-batch synchronizes the gradients of all ranks.
        """
        if isinstance(self._ddp, DistributedDataParallel):
            self._ddp.require_backward_grad_sync = is_last
        # ranks with and without images exchange statistics of BatchNorm in one precision
        is_low = self._autocast is not None and len(micro_batch.image_ids) > 0
        with torch.autocast(self.device.type, self._autocast, enabled=is_low):
            logits_NKHW = self._ddp(micro_batch.images_NCHW)
        loss = self.loss.share(logits_NKHW, micro_batch, counts)
        (loss * self._ranks.world_size).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean
        return loss.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the state of network, EMA and optimizer to the CPU, by name."""
        state = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        if self._ema is not None:
            state |= {f"mean.{name}": t for name, t in self._ema.state_dict().items()}
        state |= {
            f"optimizer.{index}.{name}": torch.as_tensor(v)
            for index, buffers in self._optimizer.state_dict()["state"].items()
            for name, v in buffers.items()
        }
        return {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what ``state_dict()`` returned; raises CheckpointError if it does not fit."""
        parts, state = defaultdict[str, Any](dict), defaultdict[int, Any](dict)
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state[int(index)][key] = tensor
        try:
            self.network.load_state_dict(parts["network"])
            if self._ema is not None:
                self._ema.load_state_dict(parts["mean"])
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this network: {one_line(error)}"
            ) from error
        for weight, buffers in self._optimizer.state.items():
            for name, tensor in buffers.items():
                if tensor.shape == weight.shape:  # fused steps need the memory layout of the weight
                    buffers[name] = torch.empty_like(weight).copy_(tensor)


def _optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Create the configured optimizer for the weights that are not frozen."""
    weights = [p for p in network.parameters() if p.requires_grad]
    # on GPUs torch's default is fast; fused CPU kernels need weights without gaps in memory
    fused = True if all(p.device.type == "cpu" and _is_dense(p) for p in weights) else None
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=config.momentum),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return kinds[config.optimizer](
        weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def learning_rate_at(step: int, steps: int, config: FitConfig) -> float:
    """Compute the learning rate of a step (from 0): a linear warm-up, then the schedule."""
    warm = round(steps * config.warmup)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * factor[config.schedule]


def autocast_dtype(config: FitConfig, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for float32."""
    is_supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    is_wanted = config.precision == "bfloat16" or (config.precision == "auto" and is_supported)
    return torch.bfloat16 if is_wanted else None


def new_network(config: TrainConfig) -> tuple[nn.Module, Header]:
    """Create the network, initialized from ``train.seed`` or ``model.checkpoint``, and its header.

    Raises ConfigError for classes or a crop size that the network does not support.
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
    """Load ``model.checkpoint``; for another number of classes the last layer is initialized anew.

    Raises ConfigError if that is not possible, CheckpointError for an unusable file.
    """
    model = config.model
    network, header = checkpoint.load(
        model.checkpoint, storage=config.storage, factory=model.factory
    )
    names = tuple(model.classes) if "classes" in model.model_fields_set else header.class_names
    if "background" in model.model_fields_set:
        header = replace(header, background=model.background)
    if len(names) == len(header.class_names):
        return network, replace(header, class_names=names, training={})
    if not isinstance(header.network, UNetSpec):
        raise ConfigError(
            f"model.classes names {len(names)}, but {model.checkpoint} has "
            f"{len(header.class_names)}, and only U-Nets of presets get a new last layer"
        )
    spec = replace(header.network, classes=1 if len(names) == 2 else len(names))
    new, old = build(spec), network.state_dict()
    fitting = {n: old[n] for n, t in new.state_dict().items() if old[n].shape == t.shape}
    new.load_state_dict(fitting, strict=False)
    return new, replace(header, network=spec, class_names=names, palette=(), training={})
