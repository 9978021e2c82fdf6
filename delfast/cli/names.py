"""The names that option help lists, and defaults, without importing torch. A test compares them with the registries."""

from __future__ import annotations

NETWORKS = ("resnet18", "resnet18-thin", "resnet50", "vit", "cnn")
METHODS = (
    *("del", "finetune", "gradient-ascent", "neggrad+", "relabel"),
    *("l1-sparse", "influence", "ssd", "scrub", "retrain"),
)
STRATEGIES = (
    *("del", "salloc", "param-weighted", "channel-unweighted", "weight", "weighted-grad-all"),
    *("random", "random-param", "shallowest", "deepest", "critmem"),
)
CRITERIA = (
    *("weighted_grad", "grad", "squared_grad", "weight"),
    *("random", "critmem", "shallowest", "deepest"),
)
BUDGET = 0.3
