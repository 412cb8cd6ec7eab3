"""Samples: byte-range index, order, augmentation numbers and the DALI pipeline."""
