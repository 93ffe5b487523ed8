"""Which model encodes images and how it runs: what a request, a manifest and a worker on another machine all name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.encoder import Encoder


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The arguments of `load_encoder` but the device.

    Attributes:
        model: its name.
        pretrained: tag or checkpoint.
        precision: "fp32", "tf32", "bf16" or "fp16".
        features: "projected", "last-block" or "pre-projection".
        exact: whether images are preprocessed exactly; None for the default of the model.
        compiled: whether `torch.compile` makes the kernels.
    """

    model: str
    pretrained: str | None = None
    precision: str = "fp32"
    features: str = "projected"
    exact: bool | None = None
    compiled: bool = False

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> ModelOptions:
        """The model that made a cache, with the tokens that the cache stores."""
        features = "last-block" if "pre" in manifest.tokens else "pre-projection" if manifest.tokens else "projected"
        return cls(
            model=manifest.model["name"],
            pretrained=manifest.model["pretrained"],
            precision=manifest.precision,
            features=features,
            exact=manifest.exact,
            compiled=manifest.compiled,
        )

    def load(self, device: str = "auto") -> Encoder:
        """Loads the model, see `load_encoder`."""
        # takes seconds to import, and a request can be wrong in cheaper ways
        from ulfine_fast.cache.models.encoder import load_encoder

        return load_encoder(**asdict(self), device=device)
