"""Other programs' formats.

Caches out: `export`, with `writers` and `lance_table`. Features in: `arrays`, `clip_retrieval` and `embedding_table`
open files and tables as `external_features`, and `import_features` makes a cache of them.
"""
