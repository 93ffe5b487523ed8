"""One study for each table of the documentation; `backbone`, `mosaics` and `through_encoder` are parts of others."""
