"""``memzoo fit | validate | test | predict``: Lightning's command line over the catalog's modules and recipes."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from memzoo.lit_modules.checkpoint import check_checkpoint
from memzoo.recipes import recipe_path


class MemzooCLI(LightningCLI):
    """LightningCLI with any module and data module, recipes by name, and errors that are raised.

    Args:
        words: The subcommand and its options.
    """

    def __init__(self, words: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=words,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that raises instead of exiting, so that ``main`` has the last word."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with recipes found by name and checkpoints checked before anything is built.

        Raises:
            ValueError: No such recipe, or a checkpoint that cannot be read.
        """
        self.config = parser.parse_args(resolve_recipes(args))
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and path not in ("best", "last", "hpc", "registry"):
            check_checkpoint("ckpt_path", path)

    def _parse_ckpt_path(self) -> None:
        """Take the architecture from the checkpoint, and nothing else.

        Lightning would put all of the checkpoint's options in place of the command line's, the model's name included.

        Raises:
            ValueError: The checkpoint is of another model.
        """
        chosen = self.config[self.config.subcommand]
        path, arguments = chosen.get("ckpt_path"), chosen["model"].get("init_args", {})
        if not path or not Path(path).is_file() or not isinstance(arguments.get("model"), str):
            return
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("hyper_parameters", {})
        if stored.get("model", arguments["model"]) != arguments["model"]:
            raise ValueError(
                f"ckpt_path={path!r} holds a {stored['model']}, the configuration names model={arguments['model']!r}; "
                f"pass a checkpoint of that model, or the config.yaml of the run that wrote this one"
            )
        arguments["overrides"] = {**(stored.get("overrides") or {}), **(arguments.get("overrides") or {})}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, its loggers agreed on the number of the run.

        Each logger takes the next free ``version_N`` when it is first asked, and would count the folder that the one
        before it has just made.
        """
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            _ = logger.version
        return trainer


def run(command: str, options: list[str]) -> None:
    """Run a subcommand of the trainer."""
    # Neither tells a user of a recipe anything: what Lightning advertises, and what it calls of torch's.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    MemzooCLI([command, *options])


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def resolve_recipes(words: list[str]) -> list[str]:
    """Replace the names of recipes behind ``--config`` by their files; files that exist come first.

    Raises:
        ValueError: A name is neither a file nor a recipe.
    """
    resolved = list(words)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            resolved[index] = f"{option}={_config_file(value)}"
        elif index + 1 < len(words):
            resolved[index + 1] = _config_file(words[index + 1])
    return resolved


def _config_file(name: str) -> str:
    return name if Path(name).is_file() else str(recipe_path(name))
