"""Heads over random parts of the channels, whose mean gives the pseudo-labels (Channel-Ensemble)."""
