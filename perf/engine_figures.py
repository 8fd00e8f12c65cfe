"""Do async, synchronous and eager mode give the same tokens? Random weights of real shapes, greedy.

Each part prints one JSON line; `--output FILE` keeps them with the machine and versions. How fast
the modes are is told by `graphengine perf run --mode`. On the CPU `--shape tiny --new 16` runs all.

    python -m perf.engine_figures [decode-8b decode-0.6b host ladder-8b] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from graphengine import LLM, SamplingParams
from perf.environment import environment
from perf.result_file import result_path, write_result
from perf.run import MODES
from perf.script import check_least, check_names, check_shape, errors_as_exit
from perf.shapes import SHAPES, write_shape
from perf.workloads import token_ids

Figures = dict[str, Any]
# Shape, rows, tokens of each prompt and of each output.
PARTS = {
    "decode-8b": ("llama-8b", 32, 256, 128),
    "decode-0.6b": ("qwen3-0.6b", 32, 128, 128),
    "host": ("qwen3-0.6b", 256, 256, 128),
    "ladder-8b": ("llama-8b", 256, 256, 64),
}


def tokens_of(mode: str, model: Path, *, rows: int, prompt: int, new: int) -> list[list[int]]:
    """Of all rows, which end at the same time: every mode has batches of the same composition."""
    llm = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=rows,
        max_model_len=-(-(prompt + new) // 256) * 256,
        **MODES[mode],
    )
    ids = token_ids([(prompt, new)] * rows, llm.model_config.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], params)
    llm.close()
    return [output.outputs[0].token_ids for output in outputs]


def compared(tokens: dict[str, list[list[int]]]) -> Figures:
    """`rows_that_differ` from the first mode's must be 0, and `distinct_outputs` the number of
    rows, or the weights make no probe."""
    first = next(iter(tokens.values()))
    return {
        "rows_that_differ": {
            mode: sum(a != b for a, b in zip(first, other, strict=True))
            for mode, other in tokens.items()
        },
        "distinct_outputs": len(set(map(tuple, first))),
    }


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=result_path)
    parser.add_argument("--shape", choices=list(SHAPES), help="run every part with this shape")
    parser.add_argument("--new", type=int, help="output tokens instead of each part's own number")
    parser.add_argument("--modes", default=",".join(MODES))
    args = parser.parse_args()
    modes = args.modes.split(",")
    parts = args.parts or list(PARTS)
    check_names("part", parts, PARTS)
    check_names("mode", modes, MODES)
    check_least(args, 1, "new")
    for part in parts:
        check_shape(args.shape or PARTS[part][0], instead="without one give --shape tiny --new 16")
    results: Figures = {"environment": environment(), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            shape, rows, prompt, new = PARTS[part]
            load = {"rows": rows, "prompt": prompt, "new": args.new or new}
            model = write_shape(args.shape or shape, Path(folder))
            tokens = {mode: tokens_of(mode, model, **load) for mode in modes}
            results["parts"][part] = {"shape": model.name, **load, **compared(tokens)}
            print(json.dumps({part: results["parts"][part]}), flush=True)
            if args.output:  # after each part: a run cut short keeps what it has
                write_result(results, args.output)


if __name__ == "__main__":
    main()
