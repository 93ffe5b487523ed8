"""The list of commands: each name with the function behind it and a line of help.

Functions are named by text and imported when their command is run, so that `ulfine-fast --help` stays fast. Related
systems add their commands here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Takes = Literal["cache", "run", "runs", "classifier", "sweep", "export", "images", "inputs", "table", "text"]
"""What an argument of a command is: "runs" a run or a folder above runs, "classifier" also an exported one, "images"
also one image or a table, "inputs" images or a cache, "text" anything."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: "module:name"; its parameters become the command's options.
        help: its line in `ulfine-fast --help`: the first sentence of the function's docstring.
        takes: what each of its arguments is; the last one may be repeated.
        examples: command lines without the program's name, which its own help ends with.
    """

    function: str
    help: str
    takes: tuple[Takes, ...] = ()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """A command with commands of its own.

    Attributes:
        help: its line in `ulfine-fast --help`, and the first one of its own help.
        commands: by name.
    """

    help: str
    commands: dict[str, Command]


COMMANDS: dict[str, Command | Group] = {
    "extract": Command(
        "ulfine_fast.cli.extract:extract",
        "Extract frozen features of images into a cache; a stopped run continues where it was.",
        takes=("images",),
        examples=(
            "extract images --out cache",
            "extract photos.csv --out cache --model ViT-B-32 --pretrained openai",
            "extract images --out cache --device cuda --precision bf16 --batch-size 256",
        ),
    ),
    "inspect": Command(
        "ulfine_fast.cli.inspect:inspect",
        "Print what is in a cache and check every byte of it.",
        takes=("cache",),
        examples=(
            "inspect cache",
            "inspect cache --json",
        ),
    ),
    "neighbors": Command(
        "ulfine_fast.cli.neighbors:neighbors",
        "Find images that are nearly the same, within and across splits.",
        takes=("cache",),
        examples=(
            "neighbors cache --threshold 0.97",
            "neighbors cache --k 5 --out neighbors.parquet",
        ),
    ),
    "cache": Group(
        "Add to a cache, describe its classes, merge caches, export them, import features of other programs.",
        {
            "append": Command(
                "ulfine_fast.cli.cache:append",
                "Add the images and classes of a source that a cache lacks; model and settings are those of the cache.",
                takes=(
                    "cache",
                    "images",
                ),
                examples=("cache append cache new-images",),
            ),
            "describe": Command(
                "ulfine_fast.cli.cache:describe",
                "Add sentences about classes to a finished cache, with the text encoder alone.",
                takes=("cache",),
                examples=("cache describe cache --descriptions sentences.json",),
            ),
            "merge": Command(
                "ulfine_fast.cli.cache:merge",
                "Make one cache of several that were extracted alike; classes are united by name.",
                takes=("cache",),
                examples=("cache merge cache-a cache-b --out both",),
            ),
            "export": Command(
                "ulfine_fast.cli.cache:export",
                "Write the features of a cache as plain arrays.",
                takes=("cache",),
                examples=(
                    "cache export cache --out arrays --to npy",
                    "cache export cache --out table --to parquet",
                ),
            ),
            "import": Command(
                "ulfine_fast.cli.cache:import_",
                "Make a cache of features that another program computed.",
                takes=("text",),
                examples=(
                    "cache import embeddings.parquet --out cache --label-column label",
                    "cache import arrays --out cache --text-features text.npy",
                ),
            ),
        },
    ),
    "methods": Command(
        "ulfine_fast.cli.methods:methods",
        "List the methods: what each does, what it needs and its source; or the options of one.",
        takes=("text",),
        examples=(
            "methods",
            "methods ulfine_plus",
        ),
    ),
    "fit": Command(
        "ulfine_fast.cli.fit:fit",
        "Train a classifier over a cache; metrics, heads and predictions go to a run folder.",
        takes=("cache",),
        examples=(
            "fit cache --out run",
            "fit cache --method linear_probe --seeds 5 --out runs/probe",
            "fit cache --split run --labels labels.csv --out again",
            "fit cache --config sweep/best.toml --out best",
        ),
    ),
    "sweep": Command(
        "ulfine_fast.cli.sweep:sweep",
        "Search for the best settings on validation; a setting given as an option holds for every trial.",
        takes=("cache",),
        examples=(
            "sweep cache --trials 256 --out sweep",
            "sweep cache --method ulfine --metric few --sampler random --seeds 3",
        ),
    ),
    "forecast": Command(
        "ulfine_fast.related.forecast.command:forecast",
        "Forecast what a sweep's best settings would reach with more labels, views or steps.",
        takes=("sweep",),
        examples=("forecast sweep --over labels --times 4",),
    ),
    "eval": Command(
        "ulfine_fast.cli.eval:evaluate",
        "Compute a run's metrics again from its head, on its own test split or another cache of the same encoder.",
        takes=("run",),
        examples=(
            "eval run",
            "eval run --cache other-cache --json",
        ),
    ),
    "predict": Command(
        "ulfine_fast.cli.predict:predict",
        "Predict the class of each image: id, class, probability and the five likeliest classes.",
        takes=(
            "classifier",
            "inputs",
        ),
        examples=(
            "predict run new-images --out predictions.csv",
            "predict run photo.jpg",
            "predict run new-images --reject 0.05 --sets 0.9",
            "predict run other-cache",
        ),
    ),
    "realign": Command(
        "ulfine_fast.related.head_realignment.command:realign",
        "Repair the head of a run that favours some classes; the result is a run folder as any other.",
        takes=("runs",),
        examples=("realign run --out realigned --by lda",),
    ),
    "adapt": Command(
        "ulfine_fast.related.test_time_adaptation.command:adapt",
        "Adapt a run to a stream of images without labels (CLIPTTA, TENT) and predict them as they arrive.",
        takes=(
            "run",
            "cache",
        ),
        examples=("adapt run stream-cache --by cliptta --out predictions.csv",),
    ),
    "multilabel": Command(
        "ulfine_fast.related.multilabel.command:multilabel",
        "Train a classifier for images that show several classes, where some labels are unknown.",
        takes=(
            "cache",
            "table",
        ),
        examples=("multilabel cache labels.csv --seeds 5 --out runs/labels",),
    ),
    "export": Command(
        "ulfine_fast.cli.export:export",
        "Write a run's classifier with its settings and a model card.",
        takes=(
            "run",
            "text",
        ),
        examples=(
            "export run --out model",
            "export run --out model --to onnx --with-encoder",
        ),
    ),
    "distill": Command(
        "ulfine_fast.cli.distill:distill",
        "Train a small network on a run's soft labels over all images; it needs no encoder.",
        takes=(
            "runs",
            "images",
        ),
        examples=("distill run images --student mobilenetv3_small_050 --out student",),
    ),
    "push": Command(
        "ulfine_fast.cli.push:push",
        "Send an export folder to a model repository, with the token of `hf auth login` or HF_TOKEN.",
        takes=(
            "export",
            "text",
        ),
        examples=("push model owner/name --private",),
    ),
    "report": Command(
        "ulfine_fast.cli.report:report",
        "Write one self-contained HTML page about runs: tables, charts, confusion, images.",
        takes=("runs",),
        examples=(
            "report run --out report.html",
            "report runs --title 'Five methods'",
        ),
    ),
    "log": Command(
        "ulfine_fast.cli.log:log",
        "Write runs in the files of an experiment tracker, without a network.",
        takes=("runs",),
        examples=("log runs --to tensorboard --out logs",),
    ),
    "review": Command(
        "ulfine_fast.cli.review:review",
        "Label many images together on a local page: clusters, likely wrong labels, rare classes; Ctrl-C ends it.",
        takes=("run",),
        examples=(
            "review run --open",
            "review run --labels labels.csv --port 8000",
        ),
    ),
    "doctor": Command(
        "ulfine_fast.cli.doctor:doctor",
        "Say what this machine offers and what it lacks: versions, GPU, kernels, extras, disk, caches, the model hub.",
        examples=("doctor", "doctor --json"),
    ),
    "demo": Command(
        "ulfine_fast.cli.demo:demo",
        "Extract, fit and report on 3,000 real images of clothes: 10 classes, long-tailed labels, a small encoder.",
        examples=(
            "demo --open",
            "demo --out demo-output --seeds 1 --json",
        ),
    ),
}
