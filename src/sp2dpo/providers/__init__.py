"""What providers and models take, and what is therefore sent. Table 6, Table 12.

Facts with a date are data, in profiles.yaml and presets.yaml; nothing here asks a provider anything.
"""

from sp2dpo.providers.presets import PRESETS, preset_annotators
from sp2dpo.providers.profiles import Batch, Catalogue, Profile, catalogue, profile_of, refuse_ended
from sp2dpo.providers.sent import Sent, params_requested, params_sent

__all__ = [
    "PRESETS",
    "Batch",
    "Catalogue",
    "Profile",
    "Sent",
    "catalogue",
    "params_requested",
    "params_sent",
    "preset_annotators",
    "profile_of",
    "refuse_ended",
]
