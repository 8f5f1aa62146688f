"""The command line: the only place that reads arguments and prints. Imports stay inside the verbs,
so that ``--help`` and a wrong config cost less than a second.
"""

import atexit
import gc
import logging
import os
import signal
import sys

import click

from jobs.backends.session import LOG_FORMAT
from jobs.commands import models, results, running
from jobs.commands.show import harmless
from unet_core import __version__
from unet_core.errors import StoppedError, UnetJobsError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    commands=[
        verb
        for room in (running, results, models)
        for verb in vars(room).values()
        if isinstance(verb, click.Command)
    ],
)
@click.version_option(__version__, prog_name="unet-jobs")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to shards and actors.")
def cli(verbose: bool) -> None:
    """Segment images with a U-Net, on this machine or on a Ray cluster, into Parquet."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=LOG_FORMAT)


def main() -> None:
    """Run a verb; errors of this project become one message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    atexit.register(gc.freeze)  # else the last collection goes through all of torch: 0.6 s
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UnetJobsError as error:
        is_stopped = isinstance(error, StoppedError)
        said = f"{error}; the same command continues there" if is_stopped else f"error: {error}"
        click.echo("\n".join(map(harmless, said.split("\n"))), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command continues where this one ended", err=True)
        sys.stdout.flush()
        os._exit(StoppedError.exit_code)  # without waiting for threads that may hang for ever
