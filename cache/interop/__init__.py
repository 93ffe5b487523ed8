"""Other programs' formats.

Features in (`import_features`) and caches out (`export`).
"""
