"""A run or a training as one HTML page that explains itself; nothing else needs this room."""
