"""The model card: what was trained on what, how well it does, by class group, and where it should not be trusted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulfine_fast.runs.run import Run

_SPECIAL = "\\`*_{}[]<>()#+-.!|~&$:@\"'"
_FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "many": "many: third of the classes with most labels",
    "medium": "medium: middle third",
    "few": "few: third with fewest labels",
    "worst_class": "worst class",
    "macro_f1": "macro F1",
    "ece_temperature_scaled": "calibration error (ECE), after the temperature",
}


def model_card(run: Run, told: dict[str, Any]) -> str:
    """The card in Markdown, with the head that the Hugging Face Hub reads.

    Class names come from whoever made the images: they are escaped wherever they stand.

    Args:
        run: what was exported.
        told: the folder's config.json.
    """
    parts = [_head(told), _title(run), _use(told), _data(run), _figures(run), _classes(run), _limits(run)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text as Markdown shows it: no markup, no HTML, one line."""
    line = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in _SPECIAL else sign for sign in line)


def _head(told: dict[str, Any]) -> str:
    # JSON's texts are YAML's too
    base = told["encoder"]["name"] if told["encoder"] else None
    lines = ["library_name: ulfine-fast", "pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in ("image-classification", "long-tailed", "semi-supervised", "clip", told["to"])]
    lines += [f"base_model: {json.dumps(base)}"] if base and "/" in base and ":" not in base else []
    return "\n".join(["---", *lines, "---"])


def _title(run: Run) -> str:
    return (
        f"# {len(run.class_names)} classes by {escaped(run.config.method)}\n\n"
        "A classifier over frozen CLIP features, fitted by "
        "ulfine-fast on few labelled and many unlabelled images."
    )


def _use(told: dict[str, Any]) -> str:
    shape, kind = ", ".join(map(str, told["input"]["shape"])), told["input"]["dtype"]
    lines = ["## Use", f"`{told['file']}` takes `{told['input']['name']}`: {kind} ({shape}); gives probabilities."]
    if told["to"] in ("onnx", "safetensors"):
        lines.append(
            '```python\nimport ulfine_fast\n\nmodel = ulfine_fast.load("this/folder")\nmodel.predict_proba(x)\n```'
        )
    encoder = told["encoder"]
    if encoder is None:
        lines.append("It was fitted on features of unknown origin.")
    else:
        tag = f", {escaped(str(encoder['pretrained']))}" if encoder["pretrained"] else ""
        lines.append(
            f"Features are those of the open_clip model {escaped(str(encoder['name']))}{tag} (weights "
            f"{encoder['sha256'][:12]}), images of {encoder['image_size']} pixels prepared as it does."
        )
    return "\n\n".join(lines)


def _data(run: Run) -> str:
    roles = {role: len(run.split.get(role, [])) for role in ("labeled", "unlabeled", "val", "test")}
    counts = run.metrics.get("class_counts") or []
    spread = f", {max(counts)} of the largest class and {min(counts)} of the smallest" if counts else ""
    return (
        f"## Data\n\n{roles['labeled']} labelled images{spread}; {roles['unlabeled']} unlabelled; {roles['val']} for "
        f"validation and the temperature; {roles['test']} for the figures below, read once at the end."
    )


def _figures(run: Run) -> str:
    rows = [
        f"| {name} | {run.metrics[key]:.3f} |"
        for key, name in _FIGURES.items()
        if isinstance(run.metrics.get(key), (int, float))
    ]
    if not rows:
        return "## Figures\n\nNone were measured: there were no test images."
    return "\n".join(["## Figures", "", "On the test split of one run.", "", "| figure | share |", "|---|---|", *rows])


def _classes(run: Run) -> str:
    accuracy = run.metrics.get("per_class_accuracy") or [None] * len(run.class_names)
    counts = run.metrics.get("class_counts") or [None] * len(run.class_names)
    rows = [
        f"| {escaped(name)} | {'-' if count is None else count} | {'-' if share is None else f'{share:.3f}'} |"
        for name, count, share in zip(run.class_names, counts, accuracy, strict=True)
    ]
    return "\n".join(["## Classes", "", "| class | labelled | accuracy |", "|---|---|---|", *rows])


def _limits(run: Run) -> str:
    return (
        "## Limits\n\n"
        "- It knows these classes alone: an image of anything else gets one of them.\n"
        "- Figures are of images like the test split's; elsewhere they may be lower, and probabilities less true.\n"
        "- Classes with few labels are the least certain, in their figures too.\n"
        "- Whatever the encoder learned from the web, its biases among it, is in the features."
    )
