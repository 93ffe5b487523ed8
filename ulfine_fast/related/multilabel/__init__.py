"""Images of several classes: tables of labels, heads with a sigmoid for each class, COMIC and its baselines.

`settings` (the options), `labels` (the table), `losses`, `heads` and `comic` (the method), `train` (the loop),
`metrics`, `run` (the folder), `command` (`ulfine-fast multilabel`). Imports engine, runs, core, ops, metrics, config
and cache.
"""
