"""What the options of a report may be."""

from __future__ import annotations

from typing import Literal

Projection = Literal["pca", "umap", "none"]
"""How the test images' features are mapped to two dimensions; "none" leaves the map out."""
