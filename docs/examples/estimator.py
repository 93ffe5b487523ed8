"""scikit-learn's own tools over features in memory: 1,797 digits, 100 of them labelled, the others -1.

Features of any encoder work; here they are the pixels themselves.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ulfine_fast import LinearProbeClassifier, ULFinePlusClassifier

features, labels = load_digits(return_X_y=True)
train, test, y_train, y_test = train_test_split(features, labels, random_state=0, stratify=labels)

# 100 labels are known
known = np.random.default_rng(0).permutation(len(train))[:100]
y = np.full(len(train), -1)
y[known] = y_train[known]

probe = make_pipeline(StandardScaler(), LinearProbeClassifier()).fit(train[known], y[known])
plus = make_pipeline(StandardScaler(), ULFinePlusClassifier()).fit(train, y)
print(f"labelled digits alone: {probe.score(test, y_test):.3f}")
print(f"and the unlabelled ones: {plus.score(test, y_test):.3f}")

search = GridSearchCV(LinearProbeClassifier(steps=200), {"lr": [0.01, 0.03, 0.1], "tau": [0.0, 1.0]}, cv=3)
search.fit(train[known], y[known])
print("best options:", search.best_params_)
