"""A teacher's part in the objective; the `distillation` group."""

from cvtrain.distillation.knowledge_distillation import KnowledgeDistillation, NoDistillation
from cvtrain.distillation.teacher import Teacher

__all__ = ["KnowledgeDistillation", "NoDistillation", "Teacher"]
