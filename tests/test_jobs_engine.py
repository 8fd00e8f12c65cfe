"""Does a job give what the engine itself gives for the same rows?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import by_index, run, write_jsonl

from graphengine import LLM, Request, SamplingParams
from graphengine.intake import derived_seed
from graphengine.jobs.workers import ENGINE

SAMPLING: dict[str, Any] = {"temperature": 2.0, "max_tokens": 10, "ignore_eos": True}


def test_rows_of_a_job_are_those_of_generate(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "999+1="}]
    rows: list[dict[str, Any]] = [{"prompt": f"{n}+{n}="} for n in range(60)]
    rows[7] = {"messages": chat}
    rows[9] = {"prompt_token_ids": [1, 5, 14, 5, 15]}
    rows[11] = {"prompt": "1" * 70}  # longer than the model takes
    rows[13] = {"prompt_token_ids": [1, 999]}
    rows[15] = {"prompt": "1+1=", "own": {"temperature": 0.0, "ignore_eos": False}}
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    outcome = run(
        source,
        tmp_path / "out.jsonl",
        factory=ENGINE,
        engine={"seed": 5, "max_num_seqs": 7},
        sampling=SAMPLING,
        sampling_column="own",
        token_ids=True,
        workers=2,
    )
    assert outcome.stats.num_failed == 2
    found = by_index(tmp_path / "out.jsonl")
    assert found[11]["error"].startswith("the prompt has 71 tokens, max_model_len is 64")
    assert found[13]["error"] == "prompt_token_ids holds 999; the vocabulary is 0..15"
    assert found[15]["text"] == "2"
    requests = []
    for index, row in enumerate(rows):
        own = row.pop("own", {})
        params = SamplingParams(**{**SAMPLING, **own, "seed": derived_seed(5, index)})
        requests.append(Request(row.get("prompt", row), params))
    with LLM("demo", device="cpu", max_num_seqs=32) as llm:
        for output in llm.generate(requests):
            record, completion = found[output.index], output.outputs[0]
            assert record["token_ids"] == completion.token_ids
            assert record["text"] == completion.text
            assert record["finish_reason"] == str(completion.finish_reason)
            assert record["num_prompt_tokens"] == len(output.prompt_token_ids)
            assert record["error"] == output.error
