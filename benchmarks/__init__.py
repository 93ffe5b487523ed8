"""Measurements that back the documentation; each module is a command: `python -m benchmarks.NAME`."""
