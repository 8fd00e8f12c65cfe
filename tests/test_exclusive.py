"""Do engines of one process never launch kernels whose blocks wait for each other at once?"""

from __future__ import annotations

import pytest
import torch

from graphengine import LLM, SamplingParams
from graphengine.errors import BusyError, CapacityError
from graphengine.kernels.exclusive import held
from graphengine.model import DecoderModel

CPU = torch.device("cpu")
PROMPTS = ["12+30=", "7+8=", "100+1="]


def test_device_is_held_by_one_at_a_time() -> None:
    with held(CPU):
        with (
            pytest.raises(BusyError, match="another LLM of this process is running on cpu"),
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
        with pytest.raises(BusyError, match="another LLM of this process"):
            second.generate(PROMPTS, params)
        with pytest.raises(BusyError, match="another LLM of this process"):
            LLM("demo", device="cpu")
        assert len(list(stream)) == len(PROMPTS) - 1
        assert len(second.generate(PROMPTS, params)) == len(PROMPTS)
        left = second.stream(PROMPTS, params)
        next(left)
        left.close()
        assert len(first.generate(PROMPTS, params)) == len(PROMPTS)


def test_engine_closed_in_mid_stream_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is still there, unfinished, and ends later without taking what is another's."""
    monkeypatch.setattr(DecoderModel, "exclusive", lambda self: held(CPU))
    first = LLM("demo", device="cpu")
    left = first.stream(PROMPTS, SamplingParams(max_tokens=4))
    next(left)
    first.close()
    with LLM("demo", device="cpu") as second:
        stream = second.stream(PROMPTS, SamplingParams(max_tokens=4))
        next(stream)
        with pytest.raises(RuntimeError, match="closed while it streamed"):
            list(left)
        with pytest.raises(BusyError, match="another LLM of this process"), held(CPU):
            pass
        assert len(list(stream)) == len(PROMPTS) - 1


def test_engine_that_cannot_be_made_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderModel, "exclusive", lambda self: held(CPU))
    with pytest.raises(CapacityError):
        LLM("demo", device="cpu", num_gpu_blocks_override=1)
    with monkeypatch.context() as broken:
        broken.setattr("graphengine.build.make_streams", lambda device: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            LLM("demo", device="cpu")
    with held(CPU):
        pass
