"""Fitted runs.

`run` (its head and predictions), `files` (the run folder's format), `seeds` (several runs of one method), `evaluate`,
`predict`, `loggers`. May import `methods`, `core` and what they may import.
"""
