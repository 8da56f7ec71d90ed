"""SP²DPO: per-pair temperatures for Direct Preference Optimization, decided before training and kept as data."""

from sp2dpo.ensemble import majority_category
from sp2dpo.reply import parse_reply
from sp2dpo.rubric import SemanticGap
from sp2dpo.temperature import envelope, schedule_beta

__all__ = ["SemanticGap", "__version__", "envelope", "majority_category", "parse_reply", "schedule_beta"]

__version__ = "0.1.0"
