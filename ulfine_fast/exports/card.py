"""The model card: what was trained on what data, how well it does by class group, and its limits."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.exports.config import COVERAGE, REJECT, calibration_of, usual_thresholds

if TYPE_CHECKING:
    from ulfine_fast.runs.calibration import Calibration
    from ulfine_fast.runs.run import Run

_SPECIAL = "\\`*_{}[]()#+-.!|~$:@\"'"
# not every reader of Markdown takes a backslash before these
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "many": "many: third of the classes with most labels",
    "medium": "medium: middle third",
    "few": "few: third with fewest labels",
    "worst_class": "worst class",
    "macro_f1": "macro F1",
    "ece_temperature_scaled": "calibration error (ECE), after the temperature",
}
_LIMITS = (
    "- It knows these classes alone: an image of anything else gets one of them, unless it is rejected.\n"
    "- The results are for images like those of the {images}; elsewhere accuracy may be lower and probabilities less "
    "reliable.\n"
    "- Classes with few labels are the least certain, and so are their results.\n"
    "- Everything the encoder learned from the web, its biases among it, is in the features."
)


def model_card(run: Run, config: dict[str, Any]) -> str:
    """The card in Markdown, with the front matter that the Hugging Face Hub reads.

    Whatever the run's files say is untrusted text: it is escaped everywhere.

    Args:
        run: the exported run.
        config: the export folder's config.json.
    """
    sections = [
        _front_matter(config),
        f"# {len(run.class_names)} classes by {escaped(run.config.method)}",
        "A classifier over frozen CLIP features, fitted by ulfine-fast on few labelled and many unlabelled images.",
        "## Use",
        *_use(config),
        "## Data",
        _data(run),
        "## Results",
        _results(run),
        "## None of these",
        _rejection(run.calibration, len(run.class_names)),
        "## Classes",
        _classes(run),
        "## Limits",
        _LIMITS.format(images="labelled images" if _estimate(run) else "test split"),
    ]
    return "\n\n".join(sections) + "\n"


def student_card(config: dict[str, Any]) -> str:
    """The card of a student, as :func:`model_card`, of the export folder's config.json."""
    about = config["student"]
    sections = [
        _front_matter(config),
        f"# {len(config['class_names'])} classes by {escaped(about['timm'])}",
        f"A network of {about['parameters'] / 1e6:.2f} million parameters, trained by ulfine-fast on the soft labels "
        f"of a classifier over frozen CLIP features ({escaped(config['method'])}, its teacher).",
        "## Use",
        *_use_of_student(config),
        "## Data",
        f"{about['images']} images trained it, each with the teacher's probabilities; {about['labels']} of them also "
        f"with their label, at a weight of {about['label_weight']:g}. {about['held_out']} images were held out: "
        f"{escaped(about['held_out_from'])}.",
        "## Results",
        _student_results(about),
        "## None of these",
        _rejection(calibration_of(config), len(config["class_names"])),
        "## Classes",
        _student_classes(config),
        "## Limits",
        _LIMITS.format(images="held-out images"),
    ]
    return "\n\n".join(sections) + "\n"


def _use_of_student(config: dict[str, Any]) -> list[str]:
    side = config["student"]["image_size"]
    graph = ", `model.onnx` for any ONNX runtime" if config["student"]["onnx"] else ""
    code = 'import ulfine_fast\n\nmodel = ulfine_fast.load("this/folder")\nmodel.predict_images("images")'
    return [
        f"`model.safetensors` holds the weights of timm's `{escaped(config['student']['timm'])}`{graph}. Input: uint8 "
        f"(n, {side}, {side}, 3).",
        f"```python\n{code}\n```",
    ]


def _student_results(about: dict[str, Any]) -> str:
    lines = [
        f"It agrees with its teacher on {about['agreement']:.1%} of the {about['held_out']} held-out images, of which "
        "it saw neither pixels nor labels."
    ]
    student, teacher = about["metrics"], about["teacher_metrics"]
    if not student:
        return "\n".join([*lines, "None of them is labelled, so that its accuracy is not known."])
    lines += [
        f"{about['held_out_labels']} of them are labelled.",
        "",
        "| metric | student | teacher |",
        "|---|---|---|",
    ]
    for key, name in _METRICS.items():
        if student.get(key) is not None and key != "ece_temperature_scaled":
            lines.append(f"| {name} | {_three_decimals(student[key])} | {_three_decimals(teacher[key])} |")
    lines.append(f"| calibration error (ECE) | {_three_decimals(student['ece'])} | {_three_decimals(teacher['ece'])} |")
    difference = about["difference"]
    if difference:
        lines += [
            "",
            f"Balanced accuracy of the student less that of the teacher: {difference['mean']:+.3f}, 95% interval "
            f"{difference['low']:+.3f} to {difference['high']:+.3f}.",
        ]
    return "\n".join(lines)


def _student_classes(config: dict[str, Any]) -> str:
    unknown = [None] * len(config["class_names"])
    student, teacher = (
        (config["student"][key] or {}).get("per_class_accuracy") or unknown for key in ("metrics", "teacher_metrics")
    )
    usual = usual_thresholds(calibration_of(config), len(unknown))
    excluded = unknown if usual is None else usual.probability
    rows = [
        f"| {escaped(name)} | {_three_decimals(own)} | {_three_decimals(teachers)} | "
        f"{'-' if least is None else f'{least:.2g}'} |"
        for name, own, teachers, least in zip(config["class_names"], student, teacher, excluded, strict=True)
    ]
    return "\n".join(["| class | student | teacher | excluded below |", "|---|---|---|---|", *rows])


def escaped(text: object) -> str:
    """A text as Markdown shows it: no markup, no HTML, no control characters, one line."""
    line = printable(" ".join(str(text).split()))
    return "".join(_ENTITIES.get(sign) or (f"\\{sign}" if sign in _SPECIAL else sign) for sign in line)


def _front_matter(config: dict[str, Any]) -> str:
    tags = ("image-classification", "long-tailed", "semi-supervised", "clip", config["to"])
    lines = ["---", "library_name: ulfine-fast", "pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    encoder = str((config["encoder"] or {}).get("name"))
    if _HUB_NAME.fullmatch(encoder):
        # a JSON text is a YAML text
        lines.append(f"base_model: {json.dumps(encoder)}")
    return "\n".join([*lines, "---"])


def _use(config: dict[str, Any]) -> list[str]:
    inputs, encoder = config["input"], config["encoder"]
    shape = ", ".join(map(str, inputs["shape"]))
    parts = [f"`{config['file']}` takes `{inputs['name']}`: {inputs['dtype']} ({shape}); returns probabilities."]
    if config["to"] in ("onnx", "safetensors"):
        code = 'import ulfine_fast\n\nmodel = ulfine_fast.load("this/folder")\nmodel.predict_proba(x)'
        parts.append(f"```python\n{code}\n```")
    if encoder is None:
        parts.append("It was fitted on features of unknown origin.")
    else:
        tag = f", {escaped(encoder['pretrained'])}" if encoder["pretrained"] else ""
        parts.append(
            f"Features are those of the open_clip model {escaped(encoder['name'])}{tag} (weights "
            f"{escaped(str(encoder['sha256'])[:12])}), images of {escaped(encoder['image_size'])} pixels with its "
            "preprocessing."
        )
    return parts


def _data(run: Run) -> str:
    rows = {role: len(run.split.get(role, [])) for role in ("labeled", "unlabeled", "val", "test")}
    counts = [count for count in run.metrics.get("class_counts") or [] if isinstance(count, int)]
    spread = f", {max(counts)} of the largest class and {min(counts)} of the smallest" if counts else ""
    if _estimate(run):
        return f"{rows['labeled']} labelled images{spread}, none held out; {rows['unlabeled']} unlabelled."
    return (
        f"{rows['labeled']} labelled images{spread}; {rows['unlabeled']} unlabelled; {rows['val']} for validation and "
        f"the temperature; {rows['test']} for the results below, read once at the end."
    )


def _estimate(run: Run) -> dict[str, Any]:
    """What cross-validation estimates of a run without a test split, else empty."""
    return run.metrics.get("cross_validation") or {}


def _results(run: Run) -> str:
    estimate = _estimate(run)
    values = estimate or run.metrics
    rows = [
        f"| {name} | {_three_decimals(values[key])} |" for key, name in _METRICS.items() if values.get(key) is not None
    ]
    if not rows:
        return "None: there were no test images."
    about = "On the test split of one run."
    if estimate:
        low, high = map(_three_decimals, estimate.get("balanced_accuracy_interval") or (None, None))
        about = (
            "Estimated by cross-validation on the labelled images, by classifiers that trained without them. The 95% "
            f"interval of the balanced accuracy is {low} to {high}."
        )
    return "\n".join([about, "", "| metric | value |", "|---|---|", *rows])


def _rejection(calibration: Calibration | None, classes: int) -> str:
    """How images of no class are rejected, and classes excluded."""
    usual = usual_thresholds(calibration, classes)
    if usual is None or calibration is None:
        return "No labels were held out, so that neither rejection nor sets of classes are calibrated."
    if math.isfinite(usual.score):
        rejection = (
            "An image is none of the classes where its score, the log-sum-exp of the logits, is below "
            f"{usual.score:.4g}: at most {REJECT:.0%} of the known classes' images are"
        )
    else:
        rejection = f"They are too few to reject images at a rate of {REJECT:g}"
    return (
        f"Calibrated on {len(calibration)} held-out labels, each class counting the same. {rejection}. A class is "
        f"excluded where its probability is below that in the table, so that {COVERAGE:.0%} of the sets hold the true "
        "class; 0 is for classes with too few held-out labels ever to be excluded."
    )


def _classes(run: Run) -> str:
    unknown = [None] * len(run.class_names)
    counts = run.metrics.get("class_counts") or unknown
    accuracies = (_estimate(run) or run.metrics).get("per_class_accuracy") or unknown
    usual = usual_thresholds(run.calibration, len(run.class_names))
    excluded = unknown if usual is None else usual.probability
    rows = [
        f"| {escaped(name)} | {'-' if count is None else escaped(count)} | {_three_decimals(accuracy)} | "
        f"{'-' if least is None else f'{least:.2g}'} |"
        for name, count, accuracy, least in zip(run.class_names, counts, accuracies, excluded, strict=True)
    ]
    head = ["| class | labelled | accuracy | excluded below |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _three_decimals(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "-"
