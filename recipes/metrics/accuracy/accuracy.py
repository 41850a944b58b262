"""Accuracy as a local metric: `evaluate.load("recipes/metrics/accuracy")` works without a network."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of the predictions that equal their reference: 1.0 is all of them, 0.0 none."

_INPUTS = """
Args:
    predictions: list of predicted class numbers.
    references: list of true class numbers, as many as predictions.

Returns:
    {"accuracy": float between 0 and 1}
"""


class Accuracy(evaluate.Metric):
    """Share of equal pairs."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
