"""Methods compared on cells of the protocol: what `benchmarks.studies.methods` is made of."""
