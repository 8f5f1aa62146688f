"""Verbs of a finished run: evaluate, export, report, status."""
