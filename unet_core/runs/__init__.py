"""The run folder: what is written, how it is read back, compacted and verified."""
