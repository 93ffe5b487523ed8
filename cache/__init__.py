"""Stage 1: pictures to a folder of HDF5 shards with frozen image and text features."""
