"""Batched operations in plain torch, each with a leading trials axis T; these are the specification."""
