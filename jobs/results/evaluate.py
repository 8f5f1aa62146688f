"""``unet-jobs evaluate``: the masks of a run against truth, or against the masks of another run."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from jobs.backends.tasks import run_tasks
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError
from unet_core.evaluation.aggregate import Aggregate, Images, changed, counted, scored
from unet_core.evaluation.evaluation import (
    EVALUATION_JSON,
    FOLDER,
    Evaluation,
    Truth,
)
from unet_core.evaluation.other_run import OtherRun
from unet_core.evaluation.truth import BesideImages, LabelImages, truth_of
from unet_core.inputs.shards import masks_at
from unet_core.runs.reader import Results
from unet_core.runs.run_folder import Identity
from unet_core.runs.schema import nodata_id
from unet_core.storage.store import Store

NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class EvaluationOutcome:
    """Result of an evaluation."""

    document: dict[str, Any]
    """``evaluation.json``."""
    set_aside: dict[str, str]
    """Shards that could not be done, by path or id, with the reason."""


def evaluate(results: Results, config: PredictConfig, name: str = "") -> EvaluationOutcome:
    """Compare a run with the truth that ``config.input.masks`` names; what is done stays done.

    Raises ConfigError if no image has a truth of use, if one has none and
    ``input.on_missing_mask`` refuses that, or if images of two tars have the same.
    """
    classes = len(results.class_names)
    config.input.require_free_ignore_index(classes)
    where = masks_at(config.input, config.storage)
    source = replace(results.source, config=config.input.model_copy(update={"masks": where}))
    truth = truth_of(source, classes)
    about = {
        "truth": where,
        "truth.digest": truth.digest,
        "input.label_map": {str(k): v for k, v in sorted(config.input.label_map.items())},
        "input.ignore_index": config.input.ignore_index,
    }
    if config.input.on_missing_mask == "background":  # the others leave the same parts
        about["input.on_missing_mask"] = "background"
    evaluation = _prepared(results, truth, config.input.ignore_index, about, where, name)
    paths = {"--truth": where} if config.input.mask_folder else {"input.uri": source.root.uri()}
    set_aside, aggregate = _run_tasks(evaluation, results, config, paths)
    _require_some(set_aside, aggregate, _without_truth(results, truth, aggregate))
    if config.input.on_missing_mask == "refuse" and aggregate.without.count:
        raise ConfigError(
            f"--truth: {aggregate.without.count} of {aggregate.totals.ok} images of "
            f"{results.run.uri} have no truth in {where!r}: "
            f"{', '.join(aggregate.without.examples)}; add it, or set input.on_missing_mask to "
            '"skip" or "background"'
        )
    found = scored(aggregate, results.class_names)
    found |= _hint(found, config.input.ignore_index)
    return _outcome(evaluation, results, set_aside, aggregate, found)


def compare(
    results: Results, other: Results, config: PredictConfig, name: str = ""
) -> EvaluationOutcome:
    """Compare a run with another run of the same images.

    Raises ConfigError if their classes are not the same.
    """
    if results.class_names != other.class_names:
        raise ConfigError(
            f"the classes of {results.run.uri} are {', '.join(results.class_names)}, those of "
            f"{other.run.uri} {', '.join(other.class_names)}; only equal ones can be compared; a "
            f"training names them: 'model.classes={json.dumps(other.class_names)}'"
        )
    truth, only_there = OtherRun.joined(results, other)
    about = {
        "against": other.run.store.uri(),
        "against.fingerprint": other.record.fingerprint,
        "against.totals": _digest(repr(other.totals)),
    }
    label = f"against-{other.run.store.uri()}"
    invalid = nodata_id(len(results.class_names))
    evaluation = _prepared(results, truth, invalid, about, label, name)
    set_aside, aggregate = _run_tasks(evaluation, results, config, {"--against": other.run.uri})
    _require_some(set_aside, aggregate, _without_other(results, other, aggregate, only_there))
    found = changed(aggregate, results.class_names, only_there)
    return _outcome(evaluation, results, set_aside, aggregate, found)


def _prepared(
    results: Results, truth: Truth, ignore_index: int, about: Identity, label: str, name: str
) -> Evaluation:
    """Resolve the folder of an evaluation: that of the name, or of one made from its identity."""
    if name and not NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: letters, digits, '.', '_' and '-' make a name")
    identity = {"run.fingerprint": results.record.fingerprint, **about}
    if not name:
        prefix = "against-" if label.startswith("against-") else ""
        last = re.sub(r"[^\w.-]+", "-", label.rstrip("/").rpartition("/")[2]).lstrip("._-")
        name = f"{prefix}{last or 'truth'}-{_digest(json.dumps(identity, sort_keys=True))}"
    run = results.run.store
    folder = Store(f"{run.uri()}/{FOLDER}/{name}", run.storage)
    first, classes = results.record.first_foreground, len(results.class_names)
    return Evaluation(run, folder, truth, classes, ignore_index, identity, first)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _run_tasks(
    evaluation: Evaluation, results: Results, config: PredictConfig, paths: dict[str, str]
) -> tuple[dict[str, str], Aggregate]:
    """Evaluate shards that have no current part; return those set aside, and the sum of all."""
    evaluation.begin()
    paths = {"RUN": results.run.uri, **paths}
    set_aside = run_tasks(evaluation, results.shards(), config, paths, "evaluating")
    return set_aside, evaluation.aggregate(evaluation.done())


def _outcome(
    evaluation: Evaluation,
    results: Results,
    set_aside: dict[str, str],
    aggregate: Aggregate,
    found: dict[str, Any],
) -> EvaluationOutcome:
    """Compose the document, and publish it if all shards are done."""
    document = {
        "run": results.run.store.uri(),
        "evaluation": evaluation.store.uri(),
        "of": evaluation.identity,
        "is_finished": results.run.is_finished,
        "counted": counted(aggregate.totals),
        **found,
    }
    if not set_aside:
        data = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
        evaluation.store.publish(EVALUATION_JSON, data)
    return EvaluationOutcome(document, set_aside)


def _require_some(set_aside: dict[str, str], aggregate: Aggregate, without: str) -> None:
    """Raises ConfigError where all is done, images are there and none was compared: with the first
    reason, or as is said where all images are ``without`` a truth.
    """
    reasons = (*aggregate.unusable.examples, *aggregate.only_ok_here.examples)
    with_truth = aggregate.totals.with_truth - aggregate.background.count
    if set_aside or with_truth or not aggregate.totals.ok:
        return
    if not reasons:
        raise ConfigError(without)
    hint = "; are these label images, or the images themselves?" if aggregate.unusable.count else ""
    raise ConfigError(f"none of {aggregate.totals.ok} images can be compared: {reasons[0]}{hint}")


def _without_truth(
    results: Results, truth: LabelImages | BesideImages, aggregate: Aggregate
) -> str:
    where = truth.source.config.masks
    hint = "" if "/" in where else f" (a folder is written with a slash: {where}/)"
    there = (  # of truth beside images only reading tells
        f"; label images: {', '.join(truth.names)}; they need the paths of their images"
        if isinstance(truth, LabelImages)
        else ""
    )
    return (
        f"--truth: none of {aggregate.totals.ok} images of {results.run.uri} has its truth in "
        f"{where!r}{hint}; images: "
        f"{', '.join((aggregate.without + aggregate.background).examples)}{there}"
    )


def _without_other(
    results: Results, other: Results, aggregate: Aggregate, only_there: Images
) -> str:
    return (
        f"--against: {other.run.uri} has none of {aggregate.totals.ok} images of "
        f"{results.run.uri}; images: {', '.join(aggregate.without.examples)}; "
        f"there: {', '.join(only_there.examples)}"
    )


def _hint(found: dict[str, Any], ignore_index: int) -> dict[str, str]:
    """Warn of masks of 0 and 255 that were not mapped: they have no foreground."""
    lacking = [s["class"] for s in found["classes"] if not s["pixels"]["tp"] + s["pixels"]["fn"]]
    if not found["ignored_pixels"] or not lacking:
        return {}
    return {
        "warning": f"no pixel of truth is {lacking[0]!r}; if {ignore_index} stands for it, give "
        f"'input.label_map={{{ignore_index}=1}}'"
    }
