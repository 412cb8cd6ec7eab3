"""Measurements: of a machine, of training, of the head beside a plain one. Nothing that trains imports them."""
