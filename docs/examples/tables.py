"""Predictions from and to tables: `python docs/examples/tables.py RUN IMAGES`.

RUN is a run folder over images, IMAGES a folder of new ones.
"""

import sys
from pathlib import Path

import pyarrow as pa

from ulfine_fast import Run
from ulfine_fast.runs.predict import predict_images

run, images = Run.load(sys.argv[1]), Path(sys.argv[2])

# a data frame of pandas or Polars, or an Arrow table, with a column `path`
table = pa.table({"path": [str(path) for path in sorted(images.rglob("*.png"))[:20]]})
predictions = predict_images(run, table)

# and back: result.to_pandas(), or polars.from_arrow(result)
result = predictions.to_arrow()
print(result.num_rows, "rows:", ", ".join(result.column_names))
