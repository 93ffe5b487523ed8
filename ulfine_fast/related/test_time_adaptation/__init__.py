"""A fitted run that adapts to a stream of images without labels (CLIPTTA, TENT)."""
