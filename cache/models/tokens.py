"""Tokens: what a model holds of an image before its last layers, taken by hooks while it runs."""

from __future__ import annotations

import threading
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError

FEATURES = ("projected", "pre-projection", "last-block")
"""What a cache may hold of an image: the feature alone; also what is projected; also the last block's class token."""


class Taps:
    """Hooks on a vision tower that keep S tokens of every image that runs through it.

    Attributes:
        kinds: names of the S tokens. "pre" and "post" are the class token before and after the last block's MLP, so
            that post = pre + ls_2(mlp(ln_2(pre))); "ln_post" is the class token that a ViT projects, "trunk" what a
            trunk of timm hands to its projection.
    """

    def __init__(self, name: str, visual: Any, features: str) -> None:
        """Hooks `visual`, the tower of the model `name`.

        Raises:
            InputError: `features` is unknown, or the tower has no such token.
        """
        # The threads of a processor share one model, and each must find the tokens of its own images.
        self._found = threading.local()
        self.kinds: tuple[str, ...] = ()
        if features not in FEATURES:
            raise InputError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
        if features == "last-block":
            self._tap_last_block(name, visual)
        elif features == "pre-projection":
            self._tap_projection(name, visual)

    def take(self) -> Tensor | None:
        """Tokens (B, S, W) of the batch that this thread has just run, float32; None without kinds."""
        if not self.kinds:
            return None
        found = torch.stack([getattr(self._found, kind).float() for kind in self.kinds], dim=1)  # (B, S, W)
        # Nothing should hold a batch in a GPU's memory until the next one.
        self._found.__dict__.clear()
        return found

    def _tap_last_block(self, name: str, visual: Any) -> None:
        _refuse_other_pooling(name, visual, "last-block")
        block, first = visual.transformer.resblocks[-1], visual.transformer.batch_first
        if not all(hasattr(block, part) for part in ("ln_2", "mlp", "ls_2")):
            raise InputError(f"the last block of {name} is of another make; extract it with --features pre-projection")
        self.kinds = ("pre", "post")
        block.ln_2.register_forward_pre_hook(lambda _, given: self._keep("pre", _class_token(given[0], first)))
        block.register_forward_hook(lambda _, given, made: self._keep("post", _class_token(made, first)))

    def _tap_projection(self, name: str, visual: Any) -> None:
        if isinstance(visual, TimmModel):
            self.kinds = ("trunk",)
            visual.trunk.register_forward_hook(lambda _, given, made: self._keep("trunk", _pooled(name, made)))
            return
        _refuse_other_pooling(name, visual, "pre-projection")
        self.kinds = ("ln_post",)
        visual.ln_post.register_forward_hook(lambda _, given, made: self._keep("ln_post", _class_token(made, True)))

    def _keep(self, kind: str, token: Tensor) -> None:
        setattr(self._found, kind, token)


def _class_token(tokens: Tensor, batch_first: bool) -> Tensor:
    """(B, L, W), or (L, B, W), to the first of the L: (B, W); what is pooled already stays."""
    if tokens.dim() == 2:
        return tokens
    # A copy, or the tokens of all patches would stay in memory behind it.
    return (tokens[:, 0] if batch_first else tokens[0]).clone()


def _pooled(name: str, made: Tensor) -> Tensor:
    if made.dim() != 2:
        raise InputError(f"{name} pools after its trunk, which gives {tuple(made.shape)}; use --features projected")
    return made


def _refuse_other_pooling(name: str, visual: Any, features: str) -> None:
    known = isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"
    if not known:
        also = " or a timm trunk" if features == "pre-projection" else ""
        raise InputError(
            f"{name} has no class token that is projected; --features {features} takes an open_clip ViT with "
            f"class-token pooling{also}, such as ViT-B-16"
        )
