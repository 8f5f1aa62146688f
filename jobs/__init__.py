"""The command line, the driver and its workers: schedule work on one machine or a Ray cluster."""
