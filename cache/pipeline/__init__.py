"""How a cache is filled.

In the order of the data: `plan` (parts of a source), `read`, `views`, `resample` (images), `encode` (features) and
`fill` (shards into a `folder`). `extract` and `append` fill from images, `merge` from other caches. `ray_engine`
encodes on other machines, `threads` on the cores of this one; `five_crops` is for predictions.
"""
