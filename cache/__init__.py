"""Stage 1: images to a folder of HDF5 shards with frozen image and text features."""
