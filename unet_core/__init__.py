"""What is computed: U-Nets, tiling, decoding, parts and the run folder. Never imports Ray."""

__version__ = "0.1.0.dev0"
