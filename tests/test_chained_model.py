"""Does a model that decodes by the chain give what it gives by the single kernels?

On a CPU, where the chain's kernel is emulated: see test_decode_chain.py for the kernel itself.
Tolerance: bfloat16 rounds in other places, 2e-2 of the norm of a step's hidden states.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from graphengine.attention import make_attention
from graphengine.attention.base import DecodeMetadata
from graphengine.kernels import kernels_for
from graphengine.kv_cache import KVCache
from graphengine.model import DecoderModel

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from cpu_launcher import CpuLauncher  # after the skip: imports cuda-bindings
from test_decode_chain import CPU, EPS, TINY, error

from graphengine.kernels.decode_chain import DecodeChain

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, NUM_ROWS = 16, 12, 32, 5


@pytest.mark.parametrize("name", TINY)
def test_chained_decode_steps_agree_with_single_kernels(name: str, tmp_path: Path) -> None:
    config = TINY[name]
    assert config.rms_norm_eps == EPS
    model = DecoderModel(
        config,
        dtype=torch.bfloat16,
        device=CPU,
        kernels=kernels_for(CPU),
        attention=make_attention("reference", CPU),
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
        parameter.data.normal_(1.0 - (parameter.dim() == 2), scale)
    kinds = [
        KVCache(config, NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CPU)
        for _ in range(2)
    ]
    chain = DecodeChain(
        config,
        cos_sin=model.cos_sin,
        block_size=BLOCK_SIZE,
        device=CPU,
        launcher=CpuLauncher(config, num_blocks=3, folder=tmp_path),
    )
    tables = torch.randperm(NUM_BLOCKS - 1)[: 2 * NUM_ROWS].view(NUM_ROWS, 2).int() + 1
    # What stands in the cache before the first step is noise.
    for caches in (
        zip(kinds[0].k, kinds[1].k, strict=True),
        zip(kinds[0].v, kinds[1].v, strict=True),
    ):
        for plain, chained in caches:
            chained.copy_(plain.normal_())
    with torch.inference_mode():
        for position in range(BLOCK_SIZE - 3, BLOCK_SIZE + 2):  # into the second block
            positions = torch.full((NUM_ROWS,), position)
            blocks = tables[:, position // BLOCK_SIZE].long()
            metadata = DecodeMetadata(
                blocks * BLOCK_SIZE + position % BLOCK_SIZE, tables, (positions + 1).int()
            )
            token_ids = torch.randint(config.vocab_size, (NUM_ROWS,))
            steps = []
            for kv, way in zip(kinds, (None, chain), strict=True):
                model._chain = way
                steps.append(model(token_ids, positions, kv, metadata))
            assert error(steps[1], steps[0].float()) < 2e-2
