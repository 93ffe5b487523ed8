"""Which images train, validate and test.

`splits` (the protocol, drawn from a seed) and `corrections` (labels that a person changed). May import `config` and
`cache`.
"""
