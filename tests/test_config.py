"""Is a wrong option of an engine named at once, whatever its type?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphengine.config import MAX_NUM_SEQS, EngineConfig
from graphengine.errors import ConfigError

WRONG = [
    ("model", 5, "give a directory or a hub id, as a string"),
    ("model", None, "give a directory or a hub id"),
    ("model", "", "give a directory or a hub id"),
    ("model", Path("demo"), "give a directory or a hub id"),
    ("tokenizer", "", "give a directory or a hub id"),
    ("tokenizer", ["demo"], "give a directory or a hub id"),
    ("trace", Path("trace.json"), "give a file, as a string"),
    ("skip_tokenizer_init", 1, "give True or False"),
    ("enforce_eager", "yes", "give True or False"),
    ("async_scheduling", None, "give True or False"),
    ("dtype", 5, "choose one of auto, float32"),
    ("max_model_len", 1, "give a whole number >= 2"),
    ("max_num_seqs", True, "give a whole number >= 1"),
    ("max_num_seqs", 16.0, "give a whole number >= 1"),
    ("max_num_seqs", None, "give a whole number >= 1"),
    ("max_num_seqs", 200_000, "give a whole number <= 4096"),
    ("max_num_batched_tokens", None, "give a whole number >= 1"),
    *(
        (name, 2**63, "give a whole number below 2**63")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
        )
    ),
    ("gpu_memory_utilization", "a", "give a share in (0, 1]"),
    ("gpu_memory_utilization", True, "give a share in (0, 1]"),
    ("gpu_memory_utilization", None, "give a share in (0, 1]"),
    ("gpu_memory_utilization", float("nan"), "give a share in (0, 1]"),
    ("seed", -1, "give a whole number in [0, 2**63)"),
]


@pytest.mark.parametrize(("name", "value", "what"), WRONG, ids=lambda value: str(value)[:12])
def test_wrong_option_is_named(name: str, value: object, what: str) -> None:
    options: dict[str, Any] = {"model": "demo", name: value}
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert str(caught.value).startswith(f"{name} is {value!r}; ")
    assert what in str(caught.value)


def test_limits_are_accepted() -> None:
    config = EngineConfig("demo", max_num_seqs=MAX_NUM_SEQS, gpu_memory_utilization=1)
    assert config.max_num_seqs == 4096
    assert config.tokenizer is None
