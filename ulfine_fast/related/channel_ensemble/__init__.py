"""Heads over random parts of the channels, whose mean draws the pseudo-labels (Channel-Ensemble)."""
