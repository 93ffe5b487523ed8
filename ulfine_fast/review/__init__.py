"""A local page to label images and correct labels on, many of them together.

`quick` (a probe that is fitted again after each answer), `estimates` (what held-out labels say of it), `proposals` (the
images whose labels would help most), `clusters` and `groups` (images to look at together), `session` (a run, its cache,
the file of corrections, fits in the background), `app` (the server). May import `report` and what `report` may import;
`engine`; `cache`.
"""
