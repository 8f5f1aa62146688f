"""How measurements are taken, timed and recorded."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS = ("jobs", "unet_core", "tests")
RESERVE_S = 20.0
"""What must be left of the budget for a measurement to begin."""


class SkippedError(Exception):
    """A measurement has no meaning here; says why."""


@dataclass(frozen=True)
class Setup:
    """Where and how large to measure; travels to child processes."""

    device_name: str
    is_tiny: bool
    cores: int
    scratch: str
    """A folder for data, removed at the end."""
    out: str
    """The folder of the figures."""

    @property
    def device(self) -> torch.device:
        """As torch knows it."""
        return torch.device(self.device_name)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU of CUDA."""
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those worth measuring; a dry run takes one."""
        return ("float32",) if self.is_tiny else ("bfloat16", "float16", "float32")

    def require_cuda(self) -> None:
        """Raise SkippedError without a GPU."""
        if not self.is_cuda:
            raise SkippedError("no CUDA device")

    def synchronise(self) -> None:
        """Wait until the device has done everything."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def device_ms(self, call: Callable[[], object], seconds: float = 1.5) -> float:
        """Median milliseconds of a call, by the device's clock, after three calls to warm up."""
        for _ in range(1 if self.is_tiny else 3):
            call()
        self.synchronise()
        spans: list[float] = []
        until = time.monotonic() + (0 if self.is_tiny else seconds)
        while len(spans) < (2 if self.is_tiny else 5) or time.monotonic() < until:
            spans.append(self._span(call))
        return statistics.median(spans)

    def _span(self, call: Callable[[], object]) -> float:
        if not self.is_cuda:
            return _wall(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def wall_ms(self, call: Callable[[], object], times: int = 5) -> float:
        """Median milliseconds of a call until the device has done it, by the wall's clock."""

        def finished() -> None:
            call()
            self.synchronise()

        finished()
        return statistics.median(_wall(finished) for _ in range(1 if self.is_tiny else times))


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


Measurement = tuple[str, Callable[[], Any]]
"""What is measured, and what gives its figures."""
Section = Callable[[Setup], Iterator[Measurement]]


@dataclass
class Day:
    """The record of a pass: figures, failures and what was skipped, by section and name."""

    out: Path
    budget_s: float
    record: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.budget_s - (time.monotonic() - self.started)

    @property
    def failures(self) -> list[str]:
        """Measurements that failed, with their section."""
        return [f"{name}: {what}" for name, kept in self.record.items() for what in kept["failed"]]

    def measure(self, section: str, measurements: Iterator[Measurement]) -> None:
        """Take the measurements of a section one after the other, each for itself."""
        self.record[section] = {"figures": {}, "failed": {}, "skipped": {}}
        try:
            for name, call in measurements:
                self._take(section, name, call)
        except Exception:  # of the section itself
            self._note(section, "failed", "section", traceback.format_exc())

    def _take(self, section: str, name: str, call: Callable[[], Any]) -> None:
        if self.left_s < RESERVE_S:
            self._note(section, "skipped", name, "no time left")
            return
        try:
            self._note(section, "figures", name, call())
        except SkippedError as reason:
            self._note(section, "skipped", name, str(reason))
        except ModuleNotFoundError as error:
            is_ours = (error.name or "").partition(".")[0] in OURS
            kind, why = ("failed", str(error)) if is_ours else ("skipped", f"no {error.name}")
            self._note(section, kind, name, why)
        except Exception:
            self._note(section, "failed", name, traceback.format_exc())
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()

    def _note(self, section: str, kind: str, name: str, value: Any) -> None:
        self.record[section][kind][name] = value
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=1, default=str)
        (self.out / "gpu_day.json").write_text(text)
        spent = time.monotonic() - self.started
        shown = str(value).strip().splitlines()[-1]
        print(f"[{spent:7.1f} s] {section} {kind}: {name}: {shown[:300]}", flush=True)

    def summary(self) -> str:
        """One line: how many of each kind, and what failed."""
        kinds = ("figures", "failed", "skipped")
        counts = [f"{sum(len(kept[k]) for kept in self.record.values())} {k}" for k in kinds]
        return "; ".join([", ".join(counts), *self.failures])
