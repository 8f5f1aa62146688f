"""What people see while a run goes on: a bar on a terminal, a plain line now and then elsewhere.

The plain lines of a job on a cluster become a bar again on the terminal of who follows it.
"""

import re
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from jobs.board import Died, Event, Ready, Released
from unet_core.inputs.shards import Shard
from unet_core.metrics import Totals
from unet_core.timings import ShardResult

MOST_OFTEN_S, LEAST_OFTEN_S = 2.0, 60.0
UNKNOWN_RATE = "–"
LINE = re.compile(r"(segmenting|training): (([\d,]+) of ~?([\d,?]+) .*)")
"""A plain line: what goes on, its text, how much of how much."""


class Pace:
    """When it is time for another plain line: less and less often, so that logs stay small."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def is_due(self) -> bool:
        """Whether to say a line now; if so, it counts as said."""
        now = time.monotonic()
        wait = min(max(MOST_OFTEN_S, (now - self._began) / 20), LEAST_OFTEN_S)
        if now - self._said < wait:
            return False
        self._said = now
        return True


def bar_columns() -> list[ProgressColumn]:
    """What a bar of segmenting shows, here and for a job elsewhere."""
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    ]


class FollowedProgress:
    """Shows a job's output line by line; on a terminal its progress lines move a bar."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            *bar_columns(), console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("starting", total=1.0, counts="", visible=False)

    def __enter__(self) -> "FollowedProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, line: str) -> None:
        """One line of the job."""
        found = LINE.fullmatch(line.rstrip())
        if found is None or self._bar.disable:
            self._console.print(line, markup=False)
            return
        what, text, done, total = found.groups()
        known = total.replace(",", "")
        share = int(done.replace(",", "")) / int(known) if known.isdigit() and int(known) else 0.0
        self._bar.update(
            self._task, description=what, completed=min(1.0, share), counts=text, visible=True
        )


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
        self._pace = Pace()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "RunProgress":
        if self._console.is_terminal:
            self._bar = Progress(*bar_columns(), console=self._console)
            self._task = self._bar.add_task("segmenting", total=1.0, counts="starting")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif self._done.shards:
            self._say()

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
        elif isinstance(event, Died | Released):
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
        elif self._pace.is_due():
            self._say()

    def _say(self) -> None:
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
        at_work = "" if self._done_shards == self._shards else f", {len(self._actors)} actors"
        return (
            f"{before + done:,} of {of} images, {rate} images/s, {failed} failed, "
            f"{self._done_shards}/{self._shards} shards{at_work}"
        )


class ShardsProgress:
    """Counts shards of something done once more with each of them."""

    def __init__(self, what: str, shards: int, done: int) -> None:
        self._what, self._shards, self._done = what, shards, done
        self._images = 0
        self._started = time.monotonic()
        self._pace = Pace()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            *bar_columns(), console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task(what, total=shards, completed=done, counts="")

    def __enter__(self) -> "ShardsProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_done(self, images: int) -> None:
        """A shard came to its end."""
        self._done += 1
        self._images += images
        rate = self._images / max(time.monotonic() - self._started, 1e-3)
        text = f"{self._done:,}/{self._shards:,} shards, {rate:.1f} images/s"
        self._bar.update(self._task, completed=self._done, counts=text)
        if self._bar.disable and self._pace.is_due():
            self._console.print(f"{self._what}: {text}")
