"""Runs that adapt to a stream of unlabelled images (CLIPTTA, TENT).

`losses`, `adapt` (a run follows a stream), `metrics` (of a stream), `command` (`ulfine-fast adapt`).
"""
