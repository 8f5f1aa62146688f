"""Training (``fit``): labelled images, their order, augmentation, loss, optimizer, folder."""
