"""cvtrain: config-driven training for computer vision that proves each artifact it ships."""

__version__ = "0.1.0"
