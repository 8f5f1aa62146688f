"""Masks compared with truth or with another run: scores by image and in total."""
