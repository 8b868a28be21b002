"""Lightning data modules."""

from memzoo.lit_modules.data.text import TextData

__all__ = ["TextData"]
