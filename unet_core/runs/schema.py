"""The Parquet files of a run: their columns and footers (``timings`` knows its own). The public
contract; see docs/formats.md.

``SCHEMA_VERSION`` changes on its own schedule, whenever a reader would notice.
"""

import json

import pyarrow as pa

from unet_core.networks.header import Header

SCHEMA_VERSION = "2"
FIRST_SCHEMA = "1"
"""Version of folders that are read, and left alone if they are finished, but not continued."""
CONFIDENCE_UNIT = 65535
"""Value of a probability of 1 in ``confidence_sum``: integers add up exactly in any order."""

NODATA_8, NODATA_16 = 255, 65535
"""Reserved class ids of 8-bit and 16-bit masks: the largest values of their types."""

PLACE = [("y", pa.int32()), ("x", pa.int32()), ("height", pa.int32()), ("width", pa.int32())]

FILE = pa.struct(
    [
        ("channel", pa.string()),
        ("key", pa.string()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
    ]
)
"""One file of an image that has a file for each channel."""

MEMBER = pa.struct(
    [
        ("key", pa.string()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("mask", pa.string()),
        ("mask_etag", pa.string()),
        ("uri", pa.string()),
        ("files", pa.list_(FILE)),
    ]
)

MANIFEST = pa.schema(
    [
        ("shard_id", pa.string()),
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("first", pa.int64()),
        ("count", pa.int64()),
        ("region", pa.struct(PLACE)),
        ("members", pa.list_(MEMBER)),
    ]
)
"""Shards; ``region`` is the rectangle of an image that is cut into several shards."""

NORMALIZATION = pa.struct(
    [(name, pa.list_(pa.float64())) for name in ("low", "high", "mean", "std")]
)
"""Values by channel that were used: the stretch, or mean and standard deviation."""

METRICS = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("source_uri", pa.string()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("class_pixels", pa.list_(pa.int64())),
        ("confidence_sum", pa.int64()),
        ("tp", pa.list_(pa.int64())),
        ("fp", pa.list_(pa.int64())),
        ("fn", pa.list_(pa.int64())),
        ("confusion", pa.list_(pa.int64())),
        ("ignored_pixels", pa.int64()),
        ("invalid_pixels", pa.int64()),
        ("skipped_pixels", pa.int64()),
        ("normalization", NORMALIZATION),
        ("is_extrapolated", pa.bool_()),
        ("crs", pa.string()),
        ("transform", pa.list_(pa.float64())),
        ("pixel_size", pa.list_(pa.float64())),
        ("pixel_unit", pa.string()),
        ("groups", pa.map_(pa.string(), pa.string())),
    ]
)
"""Rows of metrics parts; those from ``invalid_pixels`` on came with schema 2 and may be null."""

EVALUATION = pa.schema(
    [
        *METRICS,
        ("truth", pa.string()),
        ("instances_truth", pa.int64()),
        ("instances_found", pa.int64()),
        ("matches", pa.list_(pa.int64())),
        ("matched_iou_sum", pa.int64()),
        ("splits", pa.int64()),
        ("merges", pa.int64()),
    ]
)
"""Metrics of a run against another truth, with the name of the truth."""

HISTORY = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("name", pa.string()),
        ("class", pa.string()),
        ("value", pa.float64()),
    ]
)
"""History of a training, one row per value; ``class`` is null for values of all classes."""

OBJECTS = pa.schema(
    [
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("class", pa.int32()),
        ("area", pa.int64()),
        *PLACE,
        ("centroid_y", pa.float64()),
        ("centroid_x", pa.float64()),
        ("mean_intensity", pa.list_(pa.float64())),
    ]
)

ANNOTATION = pa.struct(
    [("class", pa.int32()), ("area", pa.int64()), *PLACE, ("segmentation", pa.string())]
)

EXPORTED = pa.schema(
    [
        ("image_id", pa.string()),
        ("file", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("status", pa.string()),
        ("problem", pa.string()),
    ]
)


def nodata_id(classes: int) -> int:
    """Return the class id of pixels that are not valid; from 256 classes on masks are 16-bit."""
    return NODATA_8 if classes <= NODATA_8 else NODATA_16


def conformed(table: pa.Table, columns: pa.Schema) -> pa.Table:
    """Select columns of a table; those that its schema did not have yet are null."""
    fields = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in columns
    ]
    return pa.table(fields, schema=columns)


def masks(encoding: str, has_probabilities: bool = False) -> pa.Schema:
    """Return the columns of a masks part; PNG masks are marked as images for dataset viewers."""
    mask, metadata = pa.binary(), {}
    if encoding == "png":
        mask = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        metadata = {"huggingface": json.dumps({"info": {"features": {"mask": {"_type": "Image"}}}})}
    return pa.schema(
        [
            ("image_id", pa.string()),
            *PLACE,
            ("image_height", pa.int32()),
            ("image_width", pa.int32()),
            ("encoding", pa.string()),
            ("mask", mask),
            *([("probabilities", pa.binary())] if has_probabilities else []),
        ],
        metadata=metadata,
    )


def footer(
    header: Header, model_sha256: str, fingerprint: str, probabilities: str
) -> dict[str, str]:
    """Make the key-value metadata that every part carries."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "model_sha256": model_sha256,
        "class_names": json.dumps(header.class_names),
        "palette": json.dumps(header.palette),
        "probabilities": probabilities,
        "nodata": str(nodata_id(header.classes)),
    }
