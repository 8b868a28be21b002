"""A context far longer than any window: constant memory, and a state on disk that goes on as if nothing happened."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from memzoo.arch import CausalLMState, SambaY, create_model, list_models, model_entry

STREAM = """
import resource
import torch
from memzoo.arch import create_model

torch.set_num_threads(1)
torch.manual_seed(0)
model = create_model("titans_mac_tiny", depth=1, dim=64, segment_size=128).eval()
sizes, peaks, state = [], [], None
with torch.inference_mode():
    for _ in range(32):  # 32 pieces of 2048 tokens
        _, state = model.prefill(torch.randint(256, (1, 2048)), state, donate=True)
        sizes.append(state.nbytes)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
assert state.blocks[0].position.item() == 2**16
assert all(tensor.isfinite().all() for tensor in state.named_tensors().values())
assert len(set(sizes)) == 1, sizes
# A cache of every token would take 28 MiB more; what an allocator does within a few is its own affair.
assert peaks[-1] - peaks[3] < 8, f"peak memory grew from {peaks[3]} to {peaks[-1]} MiB between 8k and 64k tokens"
"""


def test_65536_tokens_stream_through_a_tiny_mac_in_constant_memory() -> None:
    result = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_generation_from_a_state_on_disk_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    depth = 8 if model_entry(name).architecture is SambaY else 2  # the least in which every layer occurs
    model = create_model(name, depth=depth).eval()
    prompt, last = torch.randint(256, (2, 120)), torch.randint(256, (2, 1))
    with torch.inference_mode():
        _, state = model.prefill(prompt)
        state.save(tmp_path / "state.safetensors")

    def text(state: CausalLMState) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        # From token 120 on past 128, where chunks, segments and windows have borders.
        return torch.stack(list(islice(model.generate(last, 16, state=state, generator=draw), 16)))

    loaded = model.initial_state(1).load(tmp_path / "state.safetensors")
    for (key, now), then in zip(loaded.named_tensors().items(), state.named_tensors().values(), strict=True):
        assert torch.equal(now, then), key
    with torch.inference_mode():
        logits, end = model.step(last[:, 0], loaded)
        expected, expected_end = model.step(last[:, 0], state)
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, end.named_tensors().values(), expected_end.named_tensors().values()))
    assert torch.equal(text(loaded), text(state))
