"""The U-Nets: presets, how far they see, and where weights come from."""
