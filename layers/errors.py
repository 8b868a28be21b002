"""Checks of arguments: every message names the argument, its value and the remedy."""

import math
from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, nn


def check_width(name: str, x: Tensor, width: int, *, like: Tensor | None = None) -> None:
    """Require ``x`` to be a floating (batch, time, width) tensor, with the batch and time of ``like`` if given.

    Raises:
        ValueError: Rank, dtype, width, or the batch or time axes are wrong.
    """
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, time, {width}): three axes")
    if not x.is_floating_point():
        raise ValueError(
            f"{name} has dtype {x.dtype}; it must be floating point: call {name}.float(), or embed it first"
        )
    if x.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: its width is {x.shape[-1]}, the layer was built for {width}; "
            f"project it first or build the layer with that width"
        )
    if x.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: no tokens; pass time >= 1")
    if like is not None and x.shape[:2] != like.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but the input has (batch, time) = {tuple(like.shape[:2])}; "
            f"both must cover the same positions"
        )


def check_dtype(name: str, x: Tensor, module: nn.Module) -> None:
    """Require ``x`` to have the dtype of the module's parameters, unless autocast is there to make them meet.

    Raises:
        ValueError: It has another.
    """
    parameter = next(module.parameters(), None)
    if parameter is None or x.dtype == parameter.dtype or torch.is_autocast_enabled(x.device.type):
        return
    raise ValueError(
        f"{name} has dtype {x.dtype}, the parameters of {type(module).__name__} have {parameter.dtype}; "
        f"cast one of them: {name}.to({parameter.dtype}), or module.to({x.dtype})"
    )


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Require ``tokens`` to be an integer (batch, time) tensor with every id in ``[0, vocab_size)``.

    The range is read on the CPU only: elsewhere it would wait for the device, whose own embedding kernel asserts it.

    Raises:
        ValueError: Rank, dtype or range is wrong.
    """
    if tokens.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it must be (batch, time): two axes")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tokens.dtype}; token ids are integers: call {name}.long()")
    if tokens.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}: no tokens; pass time >= 1")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"{name} holds id {bad}, outside [0, {vocab_size}); use the tokenizer the model was built for, "
                f"or build the model with a larger vocab_size"
            )


def check_positive(name: str, value: int, remedy: str = "use a whole number >= 1") -> None:
    """Require a whole number >= 1.

    Raises:
        ValueError: It is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number >= 1; {remedy}")


def check_count(name: str, value: int, remedy: str = "use one") -> None:
    """Require a whole number >= 0.

    Raises:
        ValueError: It is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} is not a whole number >= 0; {remedy}")


def check_number(name: str, value: float, *, zero: bool = False) -> None:
    """Require a finite number above zero, or from zero if it may be ``zero``.

    Raises:
        ValueError: It is none.
    """
    sign = ">=" if zero else ">"
    if not isinstance(value, int | float) or not 0 <= value < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name}={value!r} is not a finite number {sign} 0; use one")


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Require ``divisor`` to divide ``value``; both must be positive.

    Raises:
        ValueError: It does not.
    """
    check_positive(name, value)
    check_positive(divisor_name, divisor)
    if value % divisor:
        raise ValueError(
            f"{name}={value} is not divisible by {divisor_name}={divisor}; use {name}={_multiples(value, divisor)}, or "
            f"another {divisor_name}"
        )


def check_multiple(name: str, value: int, of: int) -> None:
    """Require a positive multiple of ``of``.

    Raises:
        ValueError: It is none.
    """
    check_positive(name, value)
    if value % of:
        raise ValueError(f"{name}={value} is not a multiple of {of}; use {name}={_multiples(value, of)}")


def _multiples(value: int, of: int) -> str:
    """Name the positive multiples of ``of`` next to ``value``."""
    below, above = value - value % of, value + of - value % of
    return f"{above}" if below == 0 else f"{below} or {above}"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Require ``value`` to be one of ``choices``.

    Raises:
        ValueError: It is not; the nearest choice is suggested.
    """
    options = list(choices)
    if value not in options:
        near = get_close_matches(str(value), [str(o) for o in options], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(repr(o) for o in options)}{hint}")
