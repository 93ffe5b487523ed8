#!/bin/sh
# The command line over a folder of pictures, options from a file: sh docs/examples/command_line.sh PICTURES
set -eu
pictures=$1

cat > options.toml <<'END'
[extract]
model = "lite0-minilm"   # no CLIP; leave the line out for ViT-B-16 of OpenAI

[fit]
method = "ulfine_plus"
seeds = 2
steps = 200
END

ulfine-fast --config options.toml extract "$pictures" --out cache
ulfine-fast inspect cache --json > facts.json
ulfine-fast --config options.toml fit cache --out runs/plus
ulfine-fast --config options.toml fit cache --method linear_probe --log tensorboard --out runs/probe
ulfine-fast report runs --out report.html
ulfine-fast predict runs/plus/seed-0 "$pictures/test" --out predictions.csv
ulfine-fast export runs/plus/seed-0 model
