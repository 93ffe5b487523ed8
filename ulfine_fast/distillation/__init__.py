"""A small network that takes images, trained on the soft labels of a run: what is left when the encoder is too large.

`teaching` (the images, their soft labels, and which are held out), `train` (the network and its checkpoint), `distill`
(the whole, to an export folder). May import `exports` and what it may import.
"""

from __future__ import annotations

from ulfine_fast.distillation.distill import Distilled, distill

__all__ = ["Distilled", "distill"]
