"""Masks beside truth: counts of pixels, scores, and where truth is found."""
