"""Neighborhood attention in the models people run: diffusers' pipelines, and NVIDIA's original Cosmos."""

from gnaflex.models.applied import Applied, apply
from gnaflex.models.cosmos_original import CosmosAttention, replace_attention
from gnaflex.models.recipes import RECIPES, Neighborhood, Recipe, Schedule, recipe
from gnaflex.models.reporting import report

__all__ = [  # noqa: RUF022 (plainly sorted)
    "Applied",
    "CosmosAttention",
    "Neighborhood",
    "RECIPES",
    "Recipe",
    "Schedule",
    "apply",
    "recipe",
    "replace_attention",
    "report",
]
