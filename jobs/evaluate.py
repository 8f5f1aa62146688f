"""``unet-jobs evaluate``: the masks of a run against truth, or against the masks of another run."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from jobs.spread import spread
from unet_core.config import PredictConfig
from unet_core.errors import ConfigError, UnetJobsError
from unet_core.evaluate import EVALUATION_JSON, NOTHING_IGNORED, Evaluation
from unet_core.results import Results
from unet_core.run import Identity
from unet_core.storage.store import Store
from unet_core.tally import Tally, changed, scored
from unet_core.truth import BesideImages, LabelImages, OtherRun, Truth, truth_of

NAME = re.compile(r"\w[\w.-]*")
DIGEST_DIGITS = 8
UNSAID_IGNORE_INDEX = 255


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation."""

    document: dict[str, Any]
    """``evaluation.json``."""
    set_aside: dict[str, str]
    """Shards that could not be done, by path or id, with the reason."""


def evaluate(results: Results, config: PredictConfig, name: str = "") -> Outcome:
    """Compare a run with the truth that ``config.input.masks`` names; what is done stays done.

    Raises ConfigError if no image has a truth, or two have the same.
    """
    where, classes = config.input.masks, len(results.class_names)
    if UNSAID_IGNORE_INDEX == config.input.ignore_index < classes:
        raise ConfigError(
            f"input.ignore_index is {UNSAID_IGNORE_INDEX} by default, which is a class of this run "
            f"of {classes}; set it to another value, e.g. 65535"
        )
    if "/" in where:
        where = Store(where, config.storage).uri()
    settings = config.input.model_copy(update={"masks": where})
    source = replace(results.source, config=settings)
    truth = truth_of(source, classes)
    identity = {
        "truth": where,
        "truth.digest": truth.digest,
        "input.label_map": {str(k): v for k, v in sorted(config.input.label_map.items())},
        "input.ignore_index": config.input.ignore_index,
    }
    evaluation = _prepared(results, truth, config.input.ignore_index, identity, where, name)
    places = {"RUN": results.run.uri} | ({"--truth": where} if "/" in where else {})
    if "/" not in where:
        places["input.uri"] = source.root.uri()
    tally, set_aside = _done(evaluation, results, config, places)
    if not set_aside and not tally.has_some:
        evaluation.store.remove_all()
        raise _nothing_found(results, truth, tally)
    return _told(evaluation, results, scored(tally, results.class_names), set_aside)


def compare(results: Results, other: Results, config: PredictConfig, name: str = "") -> Outcome:
    """Compare a run with what another one made of the same images.

    Raises ConfigError if their classes are not the same.
    """
    if results.class_names != other.class_names:
        raise ConfigError(
            f"the classes of {results.run.uri} are {', '.join(results.class_names)}, those of "
            f"{other.run.uri} {', '.join(other.class_names)}; only equal ones can be compared"
        )
    truth, only_there = OtherRun.joined(results, other)
    identity = {
        "against": other.run.store.uri(),
        "against.fingerprint": other.record.fingerprint,
        "against.totals": _digest(repr(other.totals)),
    }
    label = f"against-{other.run.store.uri()}"
    evaluation = _prepared(results, truth, NOTHING_IGNORED, identity, label, name)
    places = {"RUN": results.run.uri, "--against": other.run.uri}
    tally, set_aside = _done(evaluation, results, config, places)
    if not set_aside and not tally.has_some:
        evaluation.store.remove_all()
        raise ConfigError(
            f"--against: {other.run.uri} has none of {tally.totals.ok} images of "
            f"{results.run.uri}; images: {', '.join(tally.without.examples)}; there: "
            f"{', '.join(only_there.examples)}"
        )
    document = changed(tally, results.class_names, only_there)
    return _told(evaluation, results, document, set_aside)


def _prepared(
    results: Results, truth: Truth, ignore_index: int, about: Identity, label: str, name: str
) -> Evaluation:
    """The evaluation of that name, or of one that tells what it is of."""
    if name and not NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: letters, digits, '.', '_' and '-' make a name")
    identity = {"run.fingerprint": results.record.fingerprint, **about}
    if not name:
        prefix = "against-" if label.startswith("against-") else ""
        last = re.sub(r"[^\w.-]+", "-", label.rstrip("/").rpartition("/")[2]).lstrip("._-")
        name = f"{prefix}{last or 'truth'}-{_digest(json.dumps(identity, sort_keys=True))}"
    uri, storage = results.run.store.uri(), results.run.store.storage
    folder = Store(f"{uri}/evaluation/{name}", storage)
    return Evaluation(
        Store(uri, storage), folder, truth, len(results.class_names), ignore_index, identity
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def _done(
    evaluation: Evaluation, results: Results, config: PredictConfig, places: dict[str, str]
) -> tuple[Tally, dict[str, str]]:
    """Do what is left, and what the run has done again since."""
    evaluation.begin()
    shards = results.shards()
    ids = {shard.shard_id for shard in shards}
    try:
        set_aside = spread(evaluation, shards, config, places, "evaluating")
    except UnetJobsError:
        if not evaluation.done():
            evaluation.store.remove_all()  # it holds a claim and nothing else
        raise
    tally = evaluation.tally(evaluation.done() & ids)
    if not set_aside and not tally.is_of(results.totals):
        evaluation.forget_stale(ids)
        set_aside = spread(evaluation, shards, config, places, "evaluating")
        tally = evaluation.tally(evaluation.done() & ids)
    return tally, set_aside


def _nothing_found(
    results: Results, truth: LabelImages | BesideImages, tally: Tally
) -> ConfigError:
    where = truth.source.config.masks
    hint = "" if "/" in where else f" (a folder is written with a slash: {where}/)"
    there = f"; label images: {', '.join(truth.names)}" if truth.names else ""
    return ConfigError(
        f"--truth: none of {tally.totals.ok} images of {results.run.uri} has its truth in "
        f"{where!r}{hint}; images: {', '.join(tally.without.examples)}{there}"
    )


def _told(
    evaluation: Evaluation, results: Results, found: dict[str, Any], set_aside: dict[str, str]
) -> Outcome:
    """Publish the document, if nothing is left."""
    folder = evaluation.store.uri()
    document = {"run": results.run.store.uri(), "evaluation": folder, "of": evaluation.identity}
    document |= {"is_finished": results.run.is_finished} | found
    if not set_aside:
        data = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
        evaluation.store.publish(EVALUATION_JSON, data)
    return Outcome(document, set_aside)
