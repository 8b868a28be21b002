"""``memzoo generate``: continue a text with a checkpoint, token by token."""

import sys
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jsonargparse import ArgumentParser


def run(command: str, options: list[str]) -> None:
    """Parse the options and write the text to stdout."""
    parser = ArgumentParser(prog=f"memzoo {command}", description=__doc__, exit_on_error=False)
    parser.add_function_arguments(generate_text)
    generate_text(**vars(parser.parse_args(options)))


def generate_text(
    *,
    checkpoint: str,
    prompt: str = "def ",
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    routing_temperature: float | None = None,
    tokenizer: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
) -> None:
    """Write a prompt and its continuation as it is generated.

    Args:
        checkpoint: A .ckpt file that a run has written.
        prompt: Text to continue.
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among this many tokens; none for all.
        top_p: Sample among the fewest tokens that add up to this probability; none for all.
        seed: Of the sample.
        routing_temperature: Of graph memory cells; that at which the run was evaluated by default.
        tokenizer: "bytes" or a tokenizer.json; the one the model was trained with by default.
        device: Where to run.
        compile: First compile what is done for a token. That takes a minute or two, later runs half of it, and a token
            then a fraction of its time: worth it for thousands of tokens. On the CPU it needs a C++ compiler.

    Raises:
        ValueError: The checkpoint cannot be read or does not fit, an option is out of range, or there is no compiler.
    """
    from memzoo.arch.compiled_step import CompiledStep, check_compiler
    from memzoo.lit_modules.trained_run import TrainedRun

    if not prompt:
        raise ValueError("prompt='' gives the model nothing to continue; pass at least one character")
    if compile and device == "cpu":
        check_compiler()
    trained = TrainedRun.find(checkpoint, tokenizer=tokenizer, device=device, routing_temperature=routing_temperature)
    model = trained.load()
    tokens = torch.tensor([trained.tokenizer.encode(prompt)], device=device)
    step = None
    if compile:
        print("compiling, a minute or two the first time", file=sys.stderr, flush=True)
        step = CompiledStep(model)
        with torch.no_grad():
            step(tokens[:, -1], model.prefill(tokens)[1])  # now, not within the text
    stream = TextStream(trained.tokenizer.decode)
    print(prompt, end="", flush=True)
    for token in model.generate(
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
        step=step,
    ):
        print(stream.add(token.item()), end="", flush=True)
    print(stream.rest())


class TextStream:
    """Turn tokens into text as they come, a character only once all its bytes are there.

    Args:
        decode: Text of token ids; a broken character is U+FFFD.

    Example:
        >>> stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
        >>> [stream.add(byte) for byte in "né".encode()]
        ['n', '', 'é']
    """

    def __init__(self, decode: Callable[[Iterable[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, token: int) -> str:
        """Return the text that the token completes."""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        """Return what was held back."""
        return self._new(self.decode(self.tokens))

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], len(text)
        return new
