"""What people see while a run goes on: a bar on a terminal, a plain line now and then elsewhere."""

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jobs.dispatch import Died, Event, Ready
from unet_core.metrics import Totals
from unet_core.shards import Shard
from unet_core.timings import ShardResult

LINE_S = 10.0
UNKNOWN_RATE = "–"


class RunProgress:
    """Counts images of this session; totals that only reading tells are estimated and get a ~."""

    def __init__(self, shards: list[Shard], plan: list[Shard], before: Totals) -> None:
        self._before = before
        self._plan = plan
        self._left_bytes = sum(shard.bytes for shard in plan)
        counts = [shard.count for shard in plan]
        self._known = sum(c for c in counts if c is not None) if None not in counts else None
        self._shards = len(shards)
        self._done_shards = len(shards) - len(plan)
        self._done = Totals()
        self._done_bytes = 0
        self._sizes = {shard.shard_id: shard.bytes for shard in plan}
        self._provisional = 0
        self._actors: set[str] = set()
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._said = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "RunProgress":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("segmenting", total=1.0, counts="starting")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()

    def on_image(self) -> None:
        """One image of a shard under way is done; called from threads of an inline run."""
        with self._lock:
            self._provisional += 1

    def on_event(self, event: Event) -> None:
        """Something happened to an actor."""
        if isinstance(event, Ready):
            if not self._actors and not self._done.shards:
                self._started = time.monotonic()  # loading the model is not the rate's business
            self._actors.add(event.actor)
        elif isinstance(event, Died):
            self._actors.discard(event.actor)

    def on_done(self, result: ShardResult) -> None:
        """A shard was committed."""
        with self._lock:
            self._done += result.totals
            self._provisional = max(0, self._provisional - result.totals.images_seen)
            self._done_bytes += self._sizes[result.shard_id]
            self._done_shards += 1

    def tick(self) -> None:
        """Refresh the bar, or say a line if it is time for one."""
        if self._bar is not None:
            self._show()
        elif time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            self._console.print(f"segmenting: {self._text()}", highlight=False, soft_wrap=True)

    def _total(self) -> tuple[float | None, bool]:
        """Images of this session and whether that is known rather than estimated."""
        if self._known is not None:
            return float(self._known), True
        if self._done_shards == self._shards:
            return float(self._done.images_seen), True
        if self._done_bytes:
            return self._done.images_seen * self._left_bytes / self._done_bytes, False
        return None, False

    def _show(self) -> None:
        assert self._bar is not None
        total, _ = self._total()
        done = self._done.images_seen + self._provisional
        share = min(1.0, done / total) if total else 0.0
        self._bar.update(self._task, completed=share, counts=self._text())

    def _text(self) -> str:
        done = self._done.images_seen + self._provisional
        total, is_known = self._total()
        before = self._before.images_seen
        of = f"{'' if is_known else '~'}{before + total:,.0f}" if total is not None else "~?"
        elapsed = time.monotonic() - self._started
        rate = f"{done / elapsed:.1f}" if done else UNKNOWN_RATE
        failed = self._before.failed + self._done.failed
        return (
            f"{before + done:,} of {of} images, {rate} images/s, {failed} failed, "
            f"{self._done_shards}/{self._shards} shards, {len(self._actors)} actors"
        )
