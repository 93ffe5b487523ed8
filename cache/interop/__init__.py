"""Other programs' formats.

Caches out: `export`, with `writers`. Features in: `arrays` and `clip_retrieval` open files as `external_features`, and
`import_features` makes a cache of them.
"""
