"""Runs and trainings as jobs on a Ray cluster."""
