"""Heads of fitted runs, trained again on class Gaussians or replaced in closed form (SLCA, SLCA++).

`gaussians` (class statistics and heads made from them), `realign` (of runs), `command` (`ulfine-fast realign`).
"""
