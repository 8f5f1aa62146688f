"""A training (``fit``): what is trained on, in which order, by which loss, kept where."""
