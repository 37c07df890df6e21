"""Which stages of a network train in which epoch, and how fast; the `finetune` group."""

from cvtrain.finetune.base import RatesPhase, Strategy
from cvtrain.finetune.constant import Early, FeatureExtraction, Full, Partial
from cvtrain.finetune.progressive import Progressive

__all__ = ["Early", "FeatureExtraction", "Full", "Partial", "Progressive", "RatesPhase", "Strategy"]
