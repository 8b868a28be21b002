"""A Lightning trainer for miniatures, which train many small models in one process."""

from typing import Any

from lightning.pytorch import Trainer


def quiet(**options: Any) -> Trainer:
    """Return a trainer that says and keeps nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
