"""Training steps without an autograd graph.

`step` is the whole step; `adapter`, `heads`, `loss` and `prototypes` are its parts, `buffers` their memory,
`cuda_graph` records a step on a GPU.
"""
