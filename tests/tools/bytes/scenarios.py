"""Scenarios: command lines of ``unet-jobs`` that follow one another, by name.

``{data}`` is what both trees read, ``{out}`` the scenario's own folder. Commands of one scenario
build on each other, scenarios do not.
"""

LOOSE = "input.shard_images=5 workers.count=inline errors.max_failed_images=1.0"
TRUTH = "input.masks={data}/truth/ 'input.label_map={255=1}' input.ignore_index=7"
TINY = (
    "train.epochs=2 train.crop=32 train.batch=4 train.crops_per_image=4 train.learning_rate=0.02 "
    "model.width=4 model.depth=2 workers.count=inline data.val_fraction=0.3"
)

PREPARED = (
    "import-weights {data}/weights/gray.pth {data}/models/gray.safetensors",
    "import-weights {data}/weights/classes.pth {data}/models/classes.safetensors "
    'model.normalisation=zscore \'model.classes=["ground", "round", "flat", "other"]\'',
    "import-weights {data}/weights/factory.pth {data}/models/factory.safetensors "
    "--factory their_network:small model.color=gray model.normalisation=percentile",
    "train {data}/cells/images {data}/cells/masks --out {data}/models/trained " + TINY,
    "pack {data}/cells/images {data}/packed --format webdataset input.masks={data}/cells/masks/",
)
"""What makes checkpoints and shards that both trees read, with the code of the first one."""

SCENARIOS: dict[str, tuple[str, ...]] = {
    "loose": (
        f"plan {{data}}/loose --out {{out}}/run {LOOSE} {TRUTH}",
        f"predict {{data}}/loose --out {{out}}/run {LOOSE} {TRUTH}",
        f"predict {{data}}/loose --out {{out}}/run {LOOSE} {TRUTH}",
        f"plan {{data}}/loose --out {{out}}/run {LOOSE} {TRUTH} --json",
        f"predict {{data}}/loose --out {{out}}/run {LOOSE} {TRUTH} tile.mode=blend",
        "status {out}/run",
        "status {out}/run --json",
        "verify {out}/run --deep",
        "verify {out}/run --deep --json",
    ),
    "awkward": (
        f"predict {{data}}/awkward --out {{out}}/run {LOOSE}",
        f"predict {{data}}/awkward --out {{out}}/run {LOOSE} --retry-failed",
        f"predict {{data}}/awkward --out {{out}}/pages {LOOSE} input.pages=expand "
        "output.encoding=png",
        f"predict {{data}}/awkward --out {{out}}/strict {LOOSE} errors.max_failed_images=2 "
        "input.shard_images=100",
        "verify {out}/pages --json",
    ),
    "channels": (
        f"predict {{data}}/awkward --out {{out}}/run {LOOSE} 'input.channels=[1]' input.axes=CYX "
        "input.max_pixels=6400 --model {data}/models/gray.safetensors",
        "report {out}/run",
    ),
    "tars": (
        "predict {data}/tars --out {out}/run input.masks=mask.png workers.count=inline "
        "errors.max_failed_images=0.5",
        "status {out}/run --json",
        "verify {out}/run --deep",
        "evaluate {out}/run --truth mask.png",
        "export {out}/run --format png --out {out}/png",
    ),
    "parquet": (
        "predict {data}/tables --out {out}/run input.masks=truth input.id_column=name tile.size=128"
        " tile.mode=blend tile.tta=flips workers.count=inline errors.max_failed_images=0.5",
        "predict {data}/tables/part-0.parquet --out {out}/dihedral tile.tta=dihedral tile.batch=2 "
        "workers.count=inline --model {data}/models/gray.safetensors output.report=false",
        "verify {out}/run --deep --json",
        "evaluate {out}/run --truth truth --json",
    ),
    "list": (
        "predict {data}/images.csv --out {out}/run input.format=list input.masks=truth "
        "workers.count=inline errors.max_failed_images=1 'input.label_map={255=1}' "
        "input.ignore_index=7",
        "verify {out}/run --deep",
        "pack {data}/images.csv {out}/packed input.format=list --format webdataset",
    ),
    "probabilities": (
        "predict {data}/loose --out {out}/uint8 output.probabilities=uint8 tile.size=128 "
        f"--model {{data}}/models/gray.safetensors {LOOSE}",
        "predict {data}/slides --out {out}/float16 output.probabilities=float16 tile.size=256 "
        f"tile.mode=blend --model {{data}}/models/classes.safetensors {LOOSE}",
        "verify {out}/uint8 --deep",
    ),
    "classes": (
        f"predict {{data}}/slides --out {{out}}/run {LOOSE} tile.size=256 tile.batch=3 "
        "--model {data}/models/classes.safetensors",
        f"predict {{data}}/slides --out {{out}}/half {LOOSE} model.precision=bfloat16 "
        "--model {data}/models/classes.safetensors",
        "evaluate {out}/half --against {out}/run --json",
        "export {out}/run --format png --out {out}/png",
        "model {data}/models/classes.safetensors side=256",
        "export {data}/models/classes.safetensors --format onnx --out {out}/classes.onnx",
    ),
    "factory": (
        PREPARED[2].replace("{data}/models", "{out}"),
        f"predict {{data}}/loose --out {{out}}/run {LOOSE} model.factory=their_network:small "
        "--model {data}/models/factory.safetensors",
        "model padded in_channels=1 width=4",
    ),
    "import": tuple(command.replace("{data}/models", "{out}") for command in PREPARED[:2]),
    "evaluate": (
        f"predict {{data}}/loose --out {{out}}/first {LOOSE}",
        f"predict {{data}}/loose --out {{out}}/second {LOOSE} model.threshold=0.8",
        "evaluate {out}/first --truth {data}/truth/ 'input.label_map={255=1}' input.ignore_index=7",
        "evaluate {out}/second --against {out}/first --name earlier",
        "report {out}/first",
        "report {out}/first --previews {out}/worst --worst 3",
        "report {out}/first --previews {out}/chosen --ids cell04.png --ids gone.png",
        "report {out}/second --previews {out}/some",
    ),
    "export": (
        f"predict {{data}}/loose --out {{out}}/run {LOOSE}",
        "export {out}/run --format png --out {out}/png",
        "export {out}/run --format tiff --out {out}/tiff",
        "export {out}/run --format coco --out {out}/coco",
        "export {out}/run --format coco --out {out}/outlines --objects watershed --polygons",
        "export {out}/run --format png --out {out}/objects --objects components",
        "export {out}/run --format tiff --out {out}/watershed --objects watershed",
        "export {out}/run --objects watershed",
    ),
    "pack": (
        "pack {data}/cells/images {out}/tars --format webdataset --shard-mb 1 "
        "input.masks={data}/cells/masks/",
        "pack {data}/cells/images {out}/tars --format webdataset --shard-mb 1 "
        "input.masks={data}/cells/masks/",
        "pack {data}/cells/images {out}/tables --format parquet --shard-mb 1 "
        "input.masks={data}/cells/masks/",
        "predict {data}/packed --out {out}/run workers.count=inline input.masks=mask.png",
    ),
    "train": (
        f"train {{data}}/cells/images {{data}}/cells/masks --out {{out}}/training {TINY}",
        f"train {{data}}/cells/images {{data}}/cells/masks --out {{out}}/training {TINY}",
        "status {out}/training",
        "status {out}/training --json",
        "report {out}/training",
        "predict {data}/loose --model {data}/models/trained/best.safetensors --out {out}/run "
        "workers.count=inline errors.max_failed_images=1.0",
        f"train {{data}}/cells/images {{data}}/loose --out {{out}}/refused {TINY}",
    ),
    "train_more": (
        f"train {{data}}/cells/images {{data}}/cells/classes --out {{out}}/classes {TINY} "
        '\'model.classes=["ground", "odd", "even"]\' loss.class_weights=balanced train.ema=0.9 '
        "augment.elastic=4 loss.focal=0.5",
        f"train {{data}}/cells/images {{data}}/cells/objects --out {{out}}/objects {TINY} "
        "data.train.instances=true loss.boundary=10 train.optimiser=sgd train.accumulate=2",
        "train {data}/cells/images {data}/cells/masks --out {out}/tuned train.epochs=1 "
        "train.crop=32 workers.count=inline model.checkpoint={data}/models/gray.safetensors",
    ),
    "mistakes": (
        "predict {data}/gone --out {out}/run workers.count=inline",
        "predict {data}/loose --out {out}/run tile.size=1",
        "predict {data}/loose --out {out}/run --model {data}/weights/gray.pth",
        "status {data}/loose",
        "evaluate {out}/run",
        "pack {data}/loose {out}/packed --format webdataset",
    ),
}
LARGE: dict[str, tuple[str, ...]] = {
    "large": (
        "predict {data}/large --out {out}/run workers.count=inline output.report=false "
        "--model {data}/models/factory.safetensors model.factory=their_network:small",
        "export {out}/run --format tiff --out {out}/tiff",
        "verify {out}/run --deep",
    ),
}
"""By window: half a minute for each tree."""
RAY: dict[str, tuple[str, ...]] = {
    "ray": (
        "predict {data}/tars --out {out}/run input.masks=mask.png workers.count=2 workers.cpus=1 "
        "errors.max_failed_images=0.5",
        "evaluate {out}/run --truth mask.png workers.count=2",
    ),
}
"""With actors on a cluster of this machine: a minute for each tree."""
