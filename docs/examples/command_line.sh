#!/bin/sh
# The command line over a folder of images, options from a file: sh docs/examples/command_line.sh IMAGES
set -eu
images=$1

cat > options.toml <<'END'
[extract]
model = "lite0-minilm"   # not CLIP; leave the line out for OpenAI's ViT-B-16

[fit]
method = "ulfine_plus"
seeds = 2
steps = 200
END

ulfine-fast --config options.toml extract "$images" --out cache
ulfine-fast inspect cache --json > facts.json
ulfine-fast --config options.toml fit cache --out runs/plus
ulfine-fast --config options.toml fit cache --method linear_probe --log tensorboard --out runs/probe
ulfine-fast report runs --out report.html
ulfine-fast predict runs/plus/seed-0 "$images/test" --out predictions.csv
ulfine-fast export runs/plus/seed-0 --out model
