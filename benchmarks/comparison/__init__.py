"""Methods compared on cells of the protocol: what `benchmarks.studies.methods` is made of.

Cells say which split is drawn (`cells`), contenders what is fitted on it (`contenders`, `scikit_learn`), at defaults or
after a search on validation (`search`). Finished parts are kept (`parts`), and shown together (`tables`).
"""
