"""Sweeps: hundreds of settings, proposed by Optuna, trained in batches, compared on validation.

In the order of a sweep: `space` (what may be tried), `choices`, `objective`, `samplers` and `pruning` (its options),
`plan` (all of them, checked), `study` (the database), `trial_batches` and `on_ray` (training), `leaderboard` and
`result` (what is written and returned), `sweep` (the whole). Imports engine, runs, methods, data, metrics, config and
cache.
"""
