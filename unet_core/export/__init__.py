"""Exports of a run for other programs. Nothing else in ``unet_core`` imports this room."""
