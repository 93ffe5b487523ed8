"""The list of commands: each name with the function behind it and a line of help.

Functions are named by text and imported when their command is run, so that `ulfine-fast --help` stays fast. Related
systems add their commands here too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: "module:name"; its parameters become the command's options.
        help: its line in `ulfine-fast --help`: the first sentence of the function's docstring.
    """

    function: str
    help: str


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
    ),
    "inspect": Command(
        "ulfine_fast.cli.inspect:inspect",
        "Print what is in a cache and check every byte of it.",
    ),
    "neighbors": Command(
        "ulfine_fast.cli.neighbors:neighbors",
        "Find images that are nearly the same, within and across splits.",
    ),
    "cache": Group(
        "Add to a cache, describe its classes, merge caches, export them, import features of other programs.",
        {
            "append": Command(
                "ulfine_fast.cli.cache:append",
                "Add the images and classes of a source that a cache lacks; model and settings are those of the cache.",
            ),
            "describe": Command(
                "ulfine_fast.cli.cache:describe",
                "Add sentences about classes to a finished cache, with the text encoder alone.",
            ),
            "merge": Command(
                "ulfine_fast.cli.cache:merge",
                "Make one cache of several that were extracted alike; classes are united by name.",
            ),
            "export": Command(
                "ulfine_fast.cli.cache:export",
                "Write the features of a cache as plain arrays.",
            ),
            "import": Command(
                "ulfine_fast.cli.cache:import_",
                "Make a cache of features that another program computed.",
            ),
        },
    ),
    "methods": Command(
        "ulfine_fast.cli.methods:methods",
        "List the methods: what each does, what it needs and its source; or the options of one.",
    ),
    "fit": Command(
        "ulfine_fast.cli.fit:fit",
        "Train a classifier over a cache; metrics, heads and predictions go to a run folder.",
    ),
    "sweep": Command(
        "ulfine_fast.cli.sweep:sweep",
        "Search for the best settings on validation; a setting given as an option holds for every trial.",
    ),
    "forecast": Command(
        "ulfine_fast.related.forecast.command:forecast",
        "Forecast what a sweep's best settings would reach with more labels, views or steps.",
    ),
    "eval": Command(
        "ulfine_fast.cli.eval:evaluate",
        "Compute a run's metrics again from its head, on its own test split or another cache of the same encoder.",
    ),
    "predict": Command(
        "ulfine_fast.cli.predict:predict",
        "Predict the class of each image: id, class, probability and the five likeliest classes.",
    ),
    "realign": Command(
        "ulfine_fast.related.head_realignment.command:realign",
        "Repair the head of a run that favours some classes; the result is a run folder as any other.",
    ),
    "adapt": Command(
        "ulfine_fast.related.test_time_adaptation.command:adapt",
        "Adapt a run to a stream of images without labels (CLIPTTA, TENT) and predict them as they arrive.",
    ),
    "multilabel": Command(
        "ulfine_fast.related.multilabel.command:multilabel",
        "Train a classifier for images that show several classes, where some labels are unknown.",
    ),
    "export": Command(
        "ulfine_fast.cli.export:export",
        "Write a run's classifier with its settings and a model card.",
    ),
    "push": Command(
        "ulfine_fast.cli.push:push",
        "Send an export folder to a model repository, with the token of `hf auth login` or HF_TOKEN.",
    ),
    "report": Command(
        "ulfine_fast.cli.report:report",
        "Write one self-contained HTML page about runs: tables, charts, confusion, images.",
    ),
    "log": Command(
        "ulfine_fast.cli.log:log",
        "Write runs in the files of an experiment tracker, without a network.",
    ),
    "review": Command(
        "ulfine_fast.cli.review:review",
        "Label many images together on a local page: clusters, likely wrong labels, rare classes; Ctrl-C ends it.",
    ),
    "demo": Command(
        "ulfine_fast.cli.demo:demo",
        "Extract, fit and report on 3,000 real images of clothes: 10 classes, long-tailed labels, a small encoder.",
    ),
}
