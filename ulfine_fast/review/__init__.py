"""A local page to correct labels on.

`ranking` (which images to look at), `session` (a run, its cache, the file of corrections, fits in the background),
`app` (the server). May import `report` and what `report` may import; `engine`; `cache`.
"""
