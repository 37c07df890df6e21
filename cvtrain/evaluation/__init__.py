"""Judging a model and its artifacts."""
