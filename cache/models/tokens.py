"""Tokens: a model's values of an image before its last layers, kept by hooks while it runs."""

from __future__ import annotations

import threading
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of

FEATURES = ("projected", "pre-projection", "last-block")
"""What a cache may hold of an image: the feature alone; also the input of its projection; also the last block's class
token before and after the MLP."""


class TokenHooks:
    """Hooks on a vision tower that keep S tokens of every image that runs through it.

    Attributes:
        kinds: names of the S tokens. "pre" and "post" are the class token before and after the last block's MLP, so
            that post = pre + ls_2(mlp(ln_2(pre))); "ln_post" is the class token that a ViT projects, "trunk" the output
            of a timm trunk before its projection.
    """

    def __init__(self, name: str, visual: Any, features: str) -> None:
        """Hooks `visual`, the vision tower of the model `name`.

        Args:
            name: for messages.
            visual: an open_clip module.
            features: one of `FEATURES`.

        Raises:
            InputError: `features` is unknown, or the tower has no such token.
        """
        # Threads share one model, and each must find the tokens of its own images.
        self._kept = threading.local()
        self.kinds: tuple[str, ...] = ()
        if features not in FEATURES:
            raise one_of("features", features, FEATURES)
        if features == "projected":
            return

        # A timm trunk
        if features == "pre-projection" and isinstance(visual, TimmModel):
            self.kinds = ("trunk",)
            visual.trunk.register_forward_hook(lambda _, inputs, output: self._keep("trunk", _pooled(name, output)))
            return

        # A ViT of open_clip
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
            also = " or a timm trunk" if features == "pre-projection" else ""
            raise InputError(
                f"{name} has no class token that is projected; --features {features} takes an open_clip ViT with "
                f"class-token pooling{also}, such as ViT-B-16"
            )
        if features == "pre-projection":
            self.kinds = ("ln_post",)
            visual.ln_post.register_forward_hook(
                lambda _, inputs, output: self._keep("ln_post", _class_token(output, batch_first=True))
            )
            return
        block, batch_first = visual.transformer.resblocks[-1], visual.transformer.batch_first
        if not all(hasattr(block, part) for part in ("ln_2", "mlp", "ls_2")):
            raise InputError(f"the last block of {name} is of another make; extract it with --features pre-projection")
        self.kinds = ("pre", "post")
        block.ln_2.register_forward_pre_hook(
            lambda _, inputs: self._keep("pre", _class_token(inputs[0], batch_first=batch_first))
        )
        block.register_forward_hook(
            lambda _, inputs, output: self._keep("post", _class_token(output, batch_first=batch_first))
        )

    def take(self) -> Tensor | None:
        """Tokens (B, S, W) of the batch that this thread has just run, float32; None without kinds."""
        if not self.kinds:
            return None
        tokens = torch.stack([getattr(self._kept, kind).float() for kind in self.kinds], dim=1)  # (B, S, W)
        # Otherwise the batch would stay in a GPU's memory until the next one.
        self._kept.__dict__.clear()
        return tokens

    def _keep(self, kind: str, token: Tensor) -> None:
        setattr(self._kept, kind, token)


def _class_token(tokens: Tensor, *, batch_first: bool) -> Tensor:
    """The first of L tokens, from (B, L, W) or (L, B, W): (B, W); pooled tokens (B, W) stay as they are."""
    if tokens.dim() == 2:
        return tokens
    # A copy, or the tokens of all patches would stay in memory behind it.
    return (tokens[:, 0] if batch_first else tokens[0]).clone()


def _pooled(name: str, output: Tensor) -> Tensor:
    """A trunk's output (B, W); refuses one that is not pooled yet."""
    if output.dim() != 2:
        raise InputError(f"{name} pools after its trunk, which gives {tuple(output.shape)}; use --features projected")
    return output
