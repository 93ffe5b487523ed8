"""Metrics of predictions, in NumPy.

`classification` (accuracy by class and by class group, quality of pseudo-labels), `calibration` (expected calibration
error, temperature), `intervals` (means with confidence intervals). May import `cache`.
"""
