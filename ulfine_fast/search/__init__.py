"""Sweeps: hundreds of settings, asked for by Optuna, trained in batched passes, judged on validation."""
