"""Training data: the byte-range index, the order of samples, augmentation, and batches by DALI or torchvision."""
