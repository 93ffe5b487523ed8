"""The class behind every name in `ulfine_fast.config.METHODS`."""

from __future__ import annotations

from ulfine_fast.methods.abc import ABC
from ulfine_fast.methods.acr import ACR
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.ccl import CCL
from ulfine_fast.methods.clip_adapter import ClipAdapter
from ulfine_fast.methods.cossl import CoSSL
from ulfine_fast.methods.cpe import CPE
from ulfine_fast.methods.crest_plus import CReSTPlus
from ulfine_fast.methods.cross_modal import CrossModal
from ulfine_fast.methods.darp import DARP
from ulfine_fast.methods.daso import DASO
from ulfine_fast.methods.finessl import FineSSL
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.flexmatch import FlexMatch
from ulfine_fast.methods.freematch import FreeMatch
from ulfine_fast.methods.gmm import Mixture
from ulfine_fast.methods.knn import NearestNeighbors
from ulfine_fast.methods.label_propagation import LabelPropagation
from ulfine_fast.methods.lift import Lift
from ulfine_fast.methods.lift_head import LiftHead
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.loft import LoFT
from ulfine_fast.methods.simpro import SimPro
from ulfine_fast.methods.softmatch import SoftMatch
from ulfine_fast.methods.supervised import LDAM, BalancedSoftmax, ClassBalanced, CrossEntropy
from ulfine_fast.methods.tip_adapter import TipAdapter
from ulfine_fast.methods.tip_adapter_f import TipAdapterF
from ulfine_fast.methods.ulfine import ULFine
from ulfine_fast.methods.ulfine_plus import ULFinePlus
from ulfine_fast.methods.zero_shot import ZeroShot
from ulfine_fast.related.label_proportions.method import Proportions
from ulfine_fast.related.preference.poft import PoFT

CLASSES: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "linear_probe": LinearProbe,
    "lightweight": Lightweight,
    "ulfine": ULFine,
    "ulfine_plus": ULFinePlus,
    "lift": Lift,
    "lift_head": LiftHead,
    "finessl": FineSSL,
    "knn": NearestNeighbors,
    "tip_adapter": TipAdapter,
    "tip_adapter_f": TipAdapterF,
    "label_propagation": LabelPropagation,
    "gmm": Mixture,
    "clip_adapter": ClipAdapter,
    "cross_modal": CrossModal,
    "loft": LoFT,
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "class_balanced": ClassBalanced,
    "ldam": LDAM,
    "fixmatch": FixMatch,
    "freematch": FreeMatch,
    "acr": ACR,
    "simpro": SimPro,
    "daso": DASO,
    "flexmatch": FlexMatch,
    "softmatch": SoftMatch,
    "abc": ABC,
    "cpe": CPE,
    "crest_plus": CReSTPlus,
    "ccl": CCL,
    "darp": DARP,
    "cossl": CoSSL,
    "poft": PoFT,
    "proportions": Proportions,
}
