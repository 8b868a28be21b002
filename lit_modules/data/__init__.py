"""Lightning data modules."""

from memzoo.lit_modules.data.recall import RecallData, RecallTask
from memzoo.lit_modules.data.text import TextData

__all__ = ["RecallData", "RecallTask", "TextData"]
