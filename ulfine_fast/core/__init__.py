"""What methods and engine share, in the order of the data.

`features` (on the device), `batches` (mini-batches), `types` (trials, state, losses), `heads` (trainable tensors and
their logits), `threads`, and `fused` (training steps without autograd). May import `data`, `ops`, `metrics`, `config`
and `cache`.
"""
