"""cvtrain: config-driven training for computer vision that proves each artifact it ships."""

import os

__version__ = "0.1.0"

# ONNX Runtime from 1.29 on reports each process to its maker and keeps an identifier of the machine; it looks here when
# it starts, and never again. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
