"""A run over features in memory, exported to safetensors and ONNX, and opened again."""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import ulfine_fast
from ulfine_fast.exports import export

features, labels = load_digits(return_X_y=True)
cache = ulfine_fast.FeatureCache.from_arrays(
    features.astype(np.float32), labels, class_names=[str(digit) for digit in range(10)]
)
run = ulfine_fast.fit(
    cache, ulfine_fast.FitConfig(method="linear_probe", n1=50, gamma_l=5, gamma_u=5, steps=50), progress=False
)

with tempfile.TemporaryDirectory() as folder:
    for to in ("safetensors", "onnx"):
        model = ulfine_fast.load(export(run, Path(folder) / to, to=to))
        difference = np.abs(model.predict_proba(features) - run.predict_proba(features)).max()
        assert difference < 1e-4
        print(f"{to}: at most {difference:.0e} from the run")
