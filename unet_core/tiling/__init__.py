"""Tile and size arithmetic."""
