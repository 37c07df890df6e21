"""Augmentation; the `aug` group."""
