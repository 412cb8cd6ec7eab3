"""Procedural faces: a labelled data set drawn from a seed, for demonstrations and tests."""
