"""What people see while a run goes on: a bar on a terminal, a plain line now and then elsewhere.

The plain lines of a job on a cluster become a bar again on the terminal of who follows it.
"""

import re
import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from unet_core.inputs.shards import Shard, images_in
from unet_core.metrics import Totals

MOST_OFTEN_S, LEAST_OFTEN_S = 2.0, 60.0
LINE = re.compile(r"(segmenting|training): (([\d,]+) of ~?([\d,?]+) .*)")
"""A plain line: what goes on, its text, how much of how much."""


class Display:
    """A bar, or where there is no terminal plain lines, less and less often: logs stay small."""

    def __init__(self, what: str, on_stderr: bool = True) -> None:
        self.console = Console(stderr=on_stderr, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self.bar.add_task(what, total=1.0, text="")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, what: str, share: float, text: str, is_last: bool = False) -> None:
        """Move the bar; where there is none, say a line if it is time for one, or the last."""
        self.bar.update(self._task, description=what, completed=share, text=text)
        now = time.monotonic()
        wait_s = min(max(MOST_OFTEN_S, (now - self._began) / 20), LEAST_OFTEN_S)
        if self.bar.disable and (is_last or now - self._said >= wait_s):
            self._said = now
            self.console.print(f"{what}: {text}")


class FollowedProgress(Display):
    """Shows a job's output line by line; on a terminal its progress lines move a bar."""

    def __init__(self) -> None:
        super().__init__("starting", on_stderr=False)

    def on_line(self, line: str) -> None:
        """One line of the job."""
        found = LINE.fullmatch(line.rstrip())
        if found is None or self.bar.disable:
            self.console.print(line, markup=False)
            return
        what, text, done, total = found.groups()
        known = total.replace(",", "")
        share = int(done.replace(",", "")) / int(known) if known.isdigit() and int(known) else 0.0
        self.show(what, min(1.0, share), text)


class RunProgress(Display):
    """Counts images of this session; totals that only reading tells are estimated and get a ~."""

    def __init__(self, shards: list[Shard], plan: list[Shard], before: Totals) -> None:
        super().__init__("segmenting")
        self._bytes = sum(shard.bytes for shard in plan)
        self._known = images_in(plan)
        self._shards, self._done_shards = len(shards), len(shards) - len(plan)
        self._before, self._done = before, Totals()
        self._done_bytes = self._provisional = 0
        self._actors = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        if self._done.shards:
            self.tick(self._actors, is_last=True)
        super().__exit__()

    def on_image(self) -> None:
        """One image of a shard under way is done; called from threads of an inline run."""
        with self._lock:
            self._provisional += 1

    def on_done(self, shard: Shard, totals: Totals) -> None:
        """A shard was committed."""
        with self._lock:
            self._provisional = max(0, self._provisional - totals.images_seen)
        self._done += totals
        self._done_bytes += shard.bytes
        self._done_shards += 1

    def tick(self, actors: int, is_last: bool = False) -> None:
        """Show how it stands, and how many actors take shards."""
        if not self._actors and not self._done.shards:
            self._started = time.monotonic()  # loading the model is not the rate's business
        self._actors = actors
        done = self._done.images_seen + self._provisional
        total, before = self._total(), self._before.images_seen
        is_over = self._done_shards == self._shards
        about = "" if is_over or self._known is not None else "~"
        of = "?" if total is None else f"{before + total:,.0f}"
        rate = f"{done / (time.monotonic() - self._started):.1f}" if done else "–"
        text = (
            f"{before + done:,} of {about}{of} images, {rate} images/s, "
            f"{self._before.failed + self._done.failed} failed, "
            f"{self._done_shards}/{self._shards} shards"
            f"{'' if is_over else f', {actors} actors'}"
        )
        self.show("segmenting", min(1.0, done / total) if total else 0.0, text, is_last)

    def _total(self) -> float | None:
        """Images of this session, as far as anybody can know."""
        if self._known is not None:
            return self._known
        if self._done_bytes:
            return self._done.images_seen * self._bytes / self._done_bytes
        return None


class ShardsProgress(Display):
    """Counts shards of something done once more with each of them."""

    def __init__(self, what: str, shards: int, done: int) -> None:
        super().__init__(what)
        self._what, self._shards, self._done = what, shards, done
        self._images, self._started = 0, time.monotonic()

    def on_done(self, images: int) -> None:
        """A shard came to its end."""
        self._done += 1
        self._images += images
        rate = self._images / max(time.monotonic() - self._started, 1e-3)
        text = f"{self._done:,}/{self._shards:,} shards, {rate:.1f} images/s"
        self.show(self._what, self._done / self._shards, text)
