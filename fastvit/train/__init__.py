"""Training: `fit` a model to images, on one process or many."""

from fastvit.train.data import Batch, Data, DataConfig, Images, Sample, load_data
from fastvit.train.loop import Interrupted, Result, fit
from fastvit.train.objectives import (
    EvalFn,
    LossFn,
    classification_loss,
    classification_metrics,
    loss_metrics,
)
from fastvit.train.recipe import Recipe

__all__ = [
    "Batch",
    "Data",
    "DataConfig",
    "EvalFn",
    "Images",
    "Interrupted",
    "LossFn",
    "Recipe",
    "Result",
    "Sample",
    "classification_loss",
    "classification_metrics",
    "fit",
    "load_data",
    "loss_metrics",
]
