"""Measurements that back the documentation. A module of `speed` or `studies` that has options is a command.

`python -m benchmarks.speed.NAME` measures ratios in one run, `python -m benchmarks.studies.NAME` makes one table of the
documentation. All of them read data sets (`data`, `images`, `pixels`) and have common options (`options`) and tables
(`results`); `comparison` is what the study of all methods is made of. Nothing outside benchmarks imports them.
"""
