"""The only way to files and objects."""
