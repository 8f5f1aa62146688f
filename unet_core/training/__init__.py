"""The rooms of ``unet_core.fit``: what is trained on, in which order, by which loss, kept where."""
