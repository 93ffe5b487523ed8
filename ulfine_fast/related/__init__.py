"""Counterparts of related systems over cached features.

Each is a small package that plugs in: methods through the registry, commands through the list in `cli/commands.py`.
Nothing outside this package imports from it.
"""
