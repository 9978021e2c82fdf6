"""The networks of the paper, and the rates it trains them with."""

from delfast.extras import extra

with extra("delfast.models"):
    from delfast.models.build import NAMES, build, check_model, factory
from delfast.models.published import PUBLISHED, Recipe, method_recipe, recipe

__all__ = ["NAMES", "PUBLISHED", "Recipe", "build", "check_model", "factory", "method_recipe", "recipe"]
