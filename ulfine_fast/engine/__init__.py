"""Training.

`fit` (the entry points), `validate` (checks before training), `scheduling` (which trials share a trial batch),
`inputs` and `trial_batch` (T trials through the loop), `steps`, `validation`, `history`, `checkpoint`, `memory`. May
import `runs`, `methods` and what they may import.
"""
