"""A local predictor of the gap of a pair: what it reads of the texts, its files, and its answers. G, J.5."""

from __future__ import annotations

from sp2dpo.predictor.model import Predictor, load_predictor, save_predictor

__all__ = ["Predictor", "load_predictor", "save_predictor"]
