"""What a run has to do: its shards, with those that a resume, retry or refresh adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from unet_core.inputs.formats import is_there, list_shards
from unet_core.inputs.shards import Shard, Source
from unet_core.runs import manifest
from unet_core.runs.run import Run


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a run without their members, and what this session has done to them."""

    shards: list[Shard]
    left: list[Shard]
    """Shards that are not committed."""
    draft: manifest.Draft | None = None
    """The manifest of a new run, not published yet."""
    is_finished: bool = False
    """Every shard is committed and ``_SUCCESS`` is written."""
    retried: int = 0
    """Shards whose commits were removed because images in them had failed."""
    added: int = 0
    """Shards of objects that were new in the input."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Files of the input that are no images of its format, by their endings, when it was listed."""


@contextmanager
def plan_shards(
    run: Run, source: Source, retry_failed: bool = False, refresh: bool = False
) -> Iterator[ShardPlan]:
    """List the input of a new run, or read the manifest of an earlier one.

    ``retry_failed`` removes the commits of shards with failed images; ``refresh`` adds objects that
    are new in the input to the manifest. Without either, nothing is written.
    """
    known = run.manifest()
    if known is None:
        with manifest.draft(list_shards(source), passed_over=source.passed_over) as draft:
            left = _left(run, draft.heads)
            yield ShardPlan(draft.heads, left, draft, passed_over=dict(source.passed_over))
        return
    retried = run.uncommit_failed(known, partial(is_there, source)) if retry_failed else 0
    new = _add_new_shards(run, source, known) if refresh else []
    shards = [*known, *new]
    left = _left(run, shards)
    is_finished = not left and run.is_finished
    passed_over = manifest.passed_over(run.store, max(shard.generation for shard in shards))
    yield ShardPlan(shards, left, None, is_finished, retried, len(new), passed_over)


def _left(run: Run, shards: list[Shard]) -> list[Shard]:
    committed = run.committed()
    return [shard for shard in shards if shard.shard_id not in committed]


def _add_new_shards(run: Run, source: Source, known: list[Shard]) -> list[Shard]:
    """Add objects that are new in the input to the manifest; return their shards.

    An object that was rewritten since it was listed is not new.
    """
    names = manifest.names(run.store, known)
    generation = 1 + max(shard.generation for shard in known)
    with manifest.draft(list_shards(source, names), generation, source.passed_over) as draft:
        if draft.heads:
            run.reopen()
            run.publish_manifest(draft)
        return draft.heads
