"""Frozen encoders.

`encoder` (open_clip), `tokens`, `prompts`, and `lite0_minilm`, the model that installs offline.
"""
