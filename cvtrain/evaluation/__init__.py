"""Judging a model and its artifacts."""

from cvtrain.evaluation.calibration import CalibrationError, fit_temperature, to_probabilities
from cvtrain.evaluation.intervals import paired_bootstrap, paired_difference, wilson
from cvtrain.evaluation.latency import Latency, measure, running
from cvtrain.evaluation.proof import EvaluationSet, Proof, prove
from cvtrain.evaluation.table import COLUMNS, ProofRow, read_artifacts_csv, write_artifacts_csv

__all__ = [
    "COLUMNS",
    "CalibrationError",
    "EvaluationSet",
    "Latency",
    "Proof",
    "ProofRow",
    "fit_temperature",
    "measure",
    "paired_bootstrap",
    "paired_difference",
    "prove",
    "read_artifacts_csv",
    "running",
    "to_probabilities",
    "wilson",
    "write_artifacts_csv",
]
