"""Judging a model and its artifacts."""

from cvtrain.evaluation.intervals import paired_difference, wilson
from cvtrain.evaluation.proof import COLUMNS, ProofRow, prove, write_artifacts_csv

__all__ = ["COLUMNS", "ProofRow", "paired_difference", "prove", "wilson", "write_artifacts_csv"]
