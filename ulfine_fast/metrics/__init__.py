"""Numbers about predictions, in NumPy.

`classification` (accuracy by class and by group), `calibration` (temperature and its error), `intervals` (means with
confidence intervals). May import `cache`.
"""
