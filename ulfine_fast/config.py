"""Every hyper-parameter of stage 2, once: type, default, range, unit and source. The command line is made from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ulfine_fast.cache.io.errors import InputError

METHODS = (
    "zero_shot",
    "linear_probe",
    "lightweight",
    "ulfine",
    "ulfine_plus",
    "lift",
    "lift_head",
    "finessl",
    "tip_adapter",
    "tip_adapter_f",
    "knn",
    "label_propagation",
    "gmm",
    "clip_adapter",
    "cross_modal",
    "loft",
    "cross_entropy",
    "balanced_softmax",
    "class_balanced",
    "ldam",
    "fixmatch",
    "freematch",
    "acr",
    "simpro",
    "daso",
    "flexmatch",
    "softmatch",
    "abc",
    "cpe",
    "crest_plus",
    "ccl",
    "darp",
    "cossl",
    "poft",
    "proportions",
)
SHAPES = ("consistent", "uniform", "reversed", "middle", "head-tail", "shuffled", "natural")


def _option(
    default: Any,
    text: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    structural: bool = False,
) -> Any:
    """A dataclass field with its help text and legal range; `structural` fields must agree inside one pass."""
    return field(
        default=default,
        metadata={
            "help": text,
            "low": low,
            "high": high,
            "choices": choices,
            "structural": structural,
        },
    )


_SPLIT_FIELDS = (
    "n1",
    "m1",
    "gamma_l",
    "gamma_u",
    "shape",
    "labeled_in_unlabeled",
    "permute_classes",
    "labeled_fraction",
    "val_fraction",
    "test_fraction",
)


@dataclass(frozen=True, slots=True)
class FitConfig:
    """One trial: its data split, method, optimiser and switches.

    Fields marked structural (see :func:`structural_key`) are the same for all trials of one batched pass; everything
    else may differ from trial to trial. Sources of the formulas stand in docs/method.md.

    Raises:
        InputError: a value outside its range or not among its choices, naming the field, the range and the value.
    """

    method: str = _option("ulfine", "what to fit", choices=METHODS, structural=True)
    seed: int = _option(0, "seed of initial weights and mini-batches", low=0, high=2**31 - 1)

    # -- split (docs/method.md, section "Protocol")
    split_seed: int | None = _option(
        None, "seed of the split and of the class order; default: the seed", low=0, high=2**31 - 1
    )
    n1: int | None = _option(
        None, "labelled images of the largest class; default: all labelled images as they are", low=1
    )
    m1: int | None = _option(None, "unlabelled images of the largest class; default: as many as the data allow", low=0)
    gamma_l: float = _option(100.0, "labelled imbalance, largest class over smallest; with n1", low=1.0)
    gamma_u: float = _option(100.0, "unlabelled imbalance, largest class over smallest; with n1", low=1.0)
    shape: str = _option("consistent", "class distribution of the unlabelled set; with n1", choices=SHAPES)
    labeled_in_unlabeled: bool = _option(False, "put the labelled images into the unlabelled set too")
    permute_classes: bool = _option(True, "draw the order of classes, head to tail, from the split seed; with n1")
    labeled_fraction: float = _option(
        1.0, "share of each class's labelled images kept labelled; without n1", low=0.0, high=1.0
    )
    val_fraction: float = _option(0.1, "share of the labelled images set aside for validation", low=0.0, high=0.5)
    test_fraction: float = _option(
        0.2, "share held out for testing where the data has no test split", low=0.01, high=0.9
    )

    # -- optimiser
    steps: int = _option(500, "mini-batch steps", low=1, structural=True)
    batch_labeled: int = _option(32, "labelled images in a mini-batch", low=1, structural=True)
    batch_unlabeled: int = _option(64, "unlabelled images in a mini-batch", low=1, structural=True)
    lr: float = _option(0.03, "peak learning rate of SGD; cosine schedule to zero", low=0.0)
    momentum: float = _option(0.9, "momentum of SGD", low=0.0, high=0.999)
    weight_decay: float = _option(5e-4, "weight decay of SGD", low=0.0)
    warmup: float = _option(
        0.5, "share of the steps over which the unlabelled loss is raised from zero", low=0.0, high=1.0
    )
    precision: str = _option("float32", "arithmetic of the logits", choices=("float32", "amp"), structural=True)
    eval_every: int = _option(50, "steps between two evaluations", low=1, structural=True)
    select: str = _option("last", "which evaluation's heads are kept", choices=("last", "best"))
    patience: int = _option(
        0, "evaluations without a better balanced accuracy on validation before a trial stops; 0 for never", low=0
    )

    # -- heads
    scale: float = _option(25.0, "cosine scale sigma of both heads (LIFT uses 25)", low=0.01)
    adapter: str = _option(
        "residual",
        "trainable adapter before the heads; adaptformer sits in the encoder's last block and needs its tokens",
        choices=("residual", "none", "adaptformer"),
        structural=True,
    )
    rank: int = _option(16, "width of the adapter's bottleneck", low=1)
    adapter_scale: float = _option(0.1, "factor s of the adapter's output", low=0.0)
    feature_noise: float = _option(
        0.0, "length of Gaussian noise added to training features; stands in for missing strong views", low=0.0
    )

    # -- losses
    tau: float = _option(1.0, "strength of the logit adjustment on labelled data; 0 is plain cross-entropy", low=0.0)
    tau_u: float = _option(
        2.0, "strength of the adjustment by the running pseudo-label distribution P on unlabelled data", low=0.0
    )
    threshold: float = _option(0.9, "smallest probability of a pseudo-label that trains", low=0.0, high=1.0)
    sharpen: float = _option(1.0, "temperature dividing fused logits before pseudo-labels are drawn", low=0.01)
    lambda_u: float = _option(0.5, "weight of the unlabelled loss", low=0.0)

    # -- ULFine: prototype adaptive fitting (PAF) and dual logit fusion (DLF)
    paf: bool = _option(True, "ulfine: fit the textual prototypes to the visual ones")
    mu: float = _option(0.01, "ulfine: largest step of a prototype, in alpha_k = mu P_k / max P", low=0.0, high=1.0)
    alpha: str = _option(
        "pseudo-label",
        "ulfine: alpha_k from P, or the constant mu",
        choices=("pseudo-label", "constant"),
        structural=True,
    )
    prior: str = _option(
        "soft",
        "ulfine: P from all probabilities, or from counts above the threshold",
        choices=("soft", "hard"),
        structural=True,
    )
    rho: float = _option(0.9, "momentum of the running pseudo-label distribution P", low=0.0, high=0.9999)
    visual_momentum: float = _option(0.95, "ulfine: momentum m of the visual prototypes", low=0.0, high=0.9999)
    lambda_o: float = _option(0.1, "ulfine: weight of the prototypes' orthogonality", low=0.0)
    orthogonality: str = _option(
        "prototypes",
        "ulfine: what the orthogonality moves; learnable prototypes, or features through the visual prototypes",
        choices=("prototypes", "features"),
        structural=True,
    )
    adjust_similarity: bool = _option(True, "ulfine: logit adjustment on the similarity head too")
    dlf: bool = _option(True, "ulfine: pseudo-labels from fused logits; otherwise from the linear head")
    eta: float = _option(0.5, "ulfine: weight of the linear head in the fused logits", low=0.0, high=1.0)
    align: str = _option(
        "standardize",
        "ulfine: how the scales of both logits are aligned before fusion",
        choices=("standardize", "max-ratio", "none"),
        structural=True,
    )
    predict_from: str = _option(
        "fused", "ulfine: logits of the final prediction", choices=("fused", "linear", "similarity"), structural=True
    )

    # -- caches of labelled images, graphs, mixtures
    cache_weight: float = _option(1.0, "tip_adapter, tip_adapter_f: weight alpha of the cache beside the text", low=0.0)
    cache_sharpness: float = _option(
        5.5, "tip_adapter, tip_adapter_f: sharpness beta of a key's affinity, exp(-beta (1 - cos))", low=0.0
    )
    neighbors: int = _option(
        5, "knn, label_propagation, gmm: nearest neighbours that vote or are linked to", low=1, structural=True
    )
    vote_temperature: float = _option(0.07, "knn: temperature t of a neighbour's vote, exp((cos - 1) / t)", low=1e-3)
    propagation: float = _option(
        0.3, "label_propagation: how far labels travel, alpha in (I - alpha S) z = y", low=0.0, high=0.99
    )
    text_power: float = _option(5.0, "label_propagation: power gamma of cosines between images and texts", low=0.0)
    anchor: float = _option(0.5, "gmm: weight lambda of the text's log probabilities", low=0.0)
    labeled_weight: float = _option(
        1.0, "gmm: weight of all labelled images in means and covariance, the unlabelled ones having 1", low=0.0
    )

    # -- margins
    margin: float = _option(8.0, "finessl: largest balanced margin, in logits", low=0.0)
    smoothing: float = _option(0.5, "finessl: label smoothing of the auxiliary head", low=0.0, high=1.0)
    largest_margin: float = _option(0.5, "ldam: margin of the rarest class, in cosines", low=0.0, high=2.0)
    defer: float = _option(0.8, "ldam: share of the steps before classes are weighted", low=0.0, high=1.0)
    effective_beta: float = _option(
        0.9999, "ldam, class_balanced: beta of the effective numbers of images", low=0.0, high=0.9999999
    )

    # -- semi-supervised baselines
    fairness: float = _option(0.01, "freematch: weight of the fairness loss", low=0.0)
    semantic_temperature: float = _option(0.05, "daso: temperature of the cosines with the class means", low=0.001)
    semantic_weight: float = _option(1.0, "daso: weight of the semantic alignment of strong and weak views", low=0.0)
    blend_temperature: float = _option(
        1.5, "daso: temperature of the guesses' distribution, by which class means are blended in", low=0.01
    )
    sampling_power: float = _option(
        1 / 3, "crest_plus: power of a class's rate, the relative count of the class of the opposite rank", low=0.0
    )
    align_power: float = _option(
        0.5, "crest_plus: last power of the labelled distribution that guesses are aligned to", low=0.0, high=1.0
    )
    darp_start: float = _option(0.4, "darp: share of the steps after which guesses are refined", low=0.0, high=1.0)
    darp_keep: float = _option(2.0, "darp: most guesses kept for a class, as a multiple of its wanted total", low=0.01)

    least_labeled: float = _option(
        0.6, "cossl: smallest share of a labelled image in a blended feature", low=0.0, high=1.0
    )
    weight_average: float = _option(
        0.98, "cossl: momentum of the averaged adapter and balanced head", low=0.0, high=0.9999
    )

    # -- ULFine plus: anchored clusters, weighed by held-out labels
    folds: int = _option(4, "ulfine_plus: parts of the labels held out in turn", low=2, structural=True)
    lean: float = _option(1.0, "ulfine_plus: weight of the labelled-only probe in the clusters' logits", low=0.0)
    label_weight: float = _option(10.0, "ulfine_plus: weight of a labelled image in its class's center", low=0.0)
    view_weight: float = _option(1.0, "ulfine_plus: weight of the scatter between views in the whitening", low=0.0)
    shrink: float = _option(0.05, "ulfine_plus: share of the scatter spread evenly over all directions", low=0.0)
    blunt: float = _option(10.0, "ulfine_plus: sharpness of the cluster probabilities in the first round", low=0.1)
    sharp: float = _option(30.0, "ulfine_plus: sharpness in the last round", low=0.1)
    pull: float = _option(0.3, "ulfine_plus: pseudo-count of the starting class shares, in unlabelled sets", low=0.0)
    trust: float = _option(20.0, "ulfine_plus: how sharply held-out log-likelihood decides between candidates", low=0.0)

    # -- LIFT's head over the encoder's own last feature
    feature: str = _option(
        "projected",
        "lift_head: what the head classifies; pre-projection is the output of the encoder's last norm, and needs a "
        "cache made by extract --features last-block or pre-projection",
        choices=("projected", "pre-projection"),
        structural=True,
    )
    crop_epochs: int = _option(
        0,
        "lift_head: epochs of the crop schedule, from crops of 8% of the image on to the whole of it; "
        "0 draws from all views alike",
        low=0,
    )

    # -- wrong labels, and references that know better
    label_noise: float = _option(
        0.0, "share of the labelled training images that are told a wrong class, drawn evenly", low=0.0, high=1.0
    )
    reference_scale: float = _option(
        1.0, "poft: factor on the logits of the references; 0 for references that know nothing", low=0.0
    )
    poft_form: str = _option(
        "preference",
        "poft: its loss, the same with rows that weigh 1 on average, or cross-entropy weighted by the references",
        choices=("preference", "equal", "weighted"),
        structural=True,
    )
    pseudo_loss: str = _option(
        "cross-entropy",
        "fixmatch: loss of its pseudo-labels, cross-entropy or one of poft's",
        choices=("cross-entropy", "preference", "equal", "weighted"),
        structural=True,
    )

    # -- channel-ensemble: heads over random channels
    ensemble_heads: int = _option(
        0,
        "fixmatch, freematch, ulfine: heads over random channels whose mean draws the pseudo-labels; 0 for one head "
        "over all of them",
        low=0,
        high=64,
        structural=True,
    )
    ensemble_share: float = _option(
        0.5, "fixmatch, freematch, ulfine: share of the channels that a head of the ensemble sees", low=0.01, high=1.0
    )
    low_bias: float = _option(
        0.0, "fixmatch, freematch, ulfine: weight of the correlation between errors of the ensemble's heads", low=0.0
    )
    low_variance: float = _option(
        0.0, "fixmatch, freematch, ulfine: weight of the ensemble's squared error on labelled images", low=0.0
    )

    # -- bags of images of which the class shares alone are known
    bag_size: int = _option(
        0, "proportions: images in a bag, to draw bags from labelled images; 0 where bags are given", low=0
    )
    stage_one: float = _option(
        0.6, "proportions: share of the steps that learn from bags, before images get labels", low=0.0, high=1.0
    )
    bag_labels: str = _option(
        "sinkhorn",
        "proportions: labels of stage two, predictions transported onto their bag's shares or as they are",
        choices=("sinkhorn", "argmax"),
        structural=True,
    )
    reverse_weight: float = _option(0.1, "proportions: weight of the reverse cross-entropy in stage two", low=0.0)
    mixup: int = _option(
        8,
        "proportions: a of the Beta(a, a) that mixes features in stage two; 0 mixes none",
        low=0,
        high=64,
        structural=True,
    )
    pseudo_labels: str = _option(
        "argmax",
        "ulfine: pseudo-labels of a mini-batch, taken as they are or transported onto the running distribution P",
        choices=("argmax", "sinkhorn"),
        structural=True,
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            _check(spec, getattr(self, spec.name))

    @property
    def data_seed(self) -> int:
        """The seed of the split: `split_seed`, or `seed` where none is given."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def reads_tokens(self) -> bool:
        """Whether the trial is given the last block's tokens instead of features."""
        return self.adapter == "adaptformer" or self.feature == "pre-projection"

    @property
    def reads_tokens_for(self) -> str:
        """The setting that asks for tokens, for messages."""
        return "adapter adaptformer" if self.adapter == "adaptformer" else f"feature {self.feature}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: a name that is no field.
        """
        names = [spec.name for spec in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise InputError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(names)}")
        return cls(**values)


def structural_key(config: FitConfig) -> tuple[Any, ...]:
    """The values that trials must share to be trained in one pass."""
    return tuple(getattr(config, spec.name) for spec in dataclasses.fields(config) if spec.metadata["structural"])


def split_key(config: FitConfig) -> tuple[Any, ...]:
    """The values that decide which images a trial is given: configs that agree in them have one split."""
    return (config.data_seed, *(getattr(config, name) for name in _SPLIT_FIELDS))


def per_trial_fields() -> list[str]:
    """Names of the numeric fields that may differ from trial to trial inside one pass."""
    types = ("float", "bool", "int")
    return [
        spec.name for spec in dataclasses.fields(FitConfig) if not spec.metadata["structural"] and spec.type in types
    ]


def _check(spec: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value of the wrong type, outside its range, or not among its choices."""
    option = spec.name
    if value is None:
        if str(spec.type).endswith("| None"):
            return
        raise InputError(f"{option} must be given, got None")
    choices = spec.metadata["choices"]
    if choices:
        if value not in choices:
            raise InputError(f"{option} must be one of {', '.join(choices)}, got {value!r}")
        return
    kind = str(spec.type).split(" ")[0]
    if kind == "bool":
        if not isinstance(value, bool):
            raise InputError(f"{option} must be true or false, got {value!r}")
        return
    _check_number(option, kind, value, spec.metadata["low"], spec.metadata["high"])


def _check_number(option: str, kind: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number of the kind, not finite, or outside [low, high]."""
    wanted = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
        raise InputError(f"{option} must be {'a whole' if kind == 'int' else 'a finite'} number, got {value!r}")
    if value < low:
        raise InputError(f"{option} must be at least {low:g}, got {value}")
    if value > high:
        raise InputError(f"{option} must be at most {high:g}, got {value}")
