"""Do engines of one process never launch kernels whose blocks wait for each other at once?"""

from __future__ import annotations

import pytest
import torch

from graphengine import LLM, SamplingParams
from graphengine.kernels.exclusive import held
from graphengine.model import DecoderModel

CPU = torch.device("cpu")
PROMPTS = ["12+30=", "7+8=", "100+1="]


def test_device_is_held_by_one_at_a_time() -> None:
    with held(CPU):
        with (
            pytest.raises(RuntimeError, match="another LLM of this process is running on cpu"),
            held(CPU),
        ):
            pass
        with held(torch.device("meta")):
            pass
    with pytest.raises(KeyError), held(CPU):
        raise KeyError
    with held(CPU):
        pass


def test_second_engine_is_refused_while_the_first_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose model decodes by the chain."""
    monkeypatch.setattr(DecoderModel, "exclusive", lambda self: held(CPU))
    params = SamplingParams(max_tokens=4)
    with LLM("demo", device="cpu") as first, LLM("demo", device="cpu") as second:
        stream = first.stream(PROMPTS, params)
        next(stream)
        with pytest.raises(RuntimeError, match="another LLM of this process"):
            second.generate(PROMPTS, params)
        with pytest.raises(RuntimeError, match="another LLM of this process"):
            LLM("demo", device="cpu")
        assert len(list(stream)) == len(PROMPTS) - 1
        assert len(second.generate(PROMPTS, params)) == len(PROMPTS)
        left = second.stream(PROMPTS, params)
        next(left)
        left.close()
        assert len(first.generate(PROMPTS, params)) == len(PROMPTS)
