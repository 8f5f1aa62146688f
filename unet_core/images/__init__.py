"""From bytes to pixels: what can be decoded, and how."""
