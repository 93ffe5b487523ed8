"""How a cache is filled.

In the order of the data: `plan`, `read`, `views`, `resample`, `encode`, `write`. Made of them: `extract`, `append`,
`merge` and `assemble` (features that exist already).
"""
