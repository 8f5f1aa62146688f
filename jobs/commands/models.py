"""Commands on networks: model, import-weights."""

import click

from jobs.commands import show
from jobs.commands.arguments import Arguments, from_arguments
from unet_core.config.import_weights import ImportConfig


@click.command(options_metavar="[OPTIONS]")
@click.argument("name", metavar="[PRESET|CHECKPOINT]", default="")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--factory", help="The function that a checkpoint names, if you trust it.")
def model(name: str, options: Arguments, factory: str | None) -> None:
    """Show all presets, or one network: parameters, GFLOP, sides, what it sees.

    Options are those of a preset (width=32 depth=3 in_channels=1 classes=2 ...) and side=PIXELS.
    """
    from jobs.tools.describe import describe, presets, texts

    if name:
        show.lines(**texts(describe(name, list(options), factory or "")))
    else:
        show.table(presets())


@click.command("import-weights")
@click.argument("source")
@click.argument("destination")
@click.argument("overrides", nargs=-1, metavar="[MODEL.KEY=VALUE]...")
@click.option("--layout", help="Which published U-Net, where the keys fit several.")
@click.option("--factory", help="package.module:function that makes another network.")
def import_weights(
    source: str, destination: str, overrides: Arguments, layout: str | None, factory: str | None
) -> None:
    """Make a checkpoint of weights from elsewhere: .pt, .pth or .safetensors.

    Say what the network was trained on with model.color=rgb, model.normalization=range (pixels to
    0..1) or others, and model.classes='["background", "cell"]'.
    """
    given = {"layout": layout, "factory": factory}
    config = from_arguments(
        ImportConfig,
        overrides,
        source=source,
        destination=destination,
        model={key: value for key, value in given.items() if value},
    )
    from unet_core.networks.foreign.weights import import_weights as run_import

    header = run_import(config)
    wanted, tiling = header.preprocessing, header.tiling
    show.lines(
        wrote=destination,
        network=f"{header.network.in_channels} channels, {', '.join(header.class_names)}",
        images=f"{wanted.color}, {wanted.normalization}",
        tiles=f"{'exact' if tiling.is_exact else 'blended'} tiles, halo {tiling.halo}, "
        f"sides {tiling.sides}",
    )
