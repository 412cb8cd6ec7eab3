"""Procedural faces: a labelled training set and a verification set drawn from a seed, for demonstrations and tests."""
