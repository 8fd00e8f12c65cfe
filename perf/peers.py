"""How fast are other engines on the same requests? transformers and vLLM, each in its own process.

Same model shape with random weights, same token ids and lengths, greedy, EOS ignored, bfloat16,
flash attention, CUDA graphs; making the engine and a short warm-up are not counted. The CPU runs
transformers alone, synchronously, to exercise this file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphengine.errors import ConfigError, GraphEngineError
from graphengine.exit_codes import describe_exit
from perf.figures import merge
from perf.workloads import Lengths, token_ids

Json = dict[str, Any]
# Each with the package it is. It runs under the Python that runs us.
PEERS = {"transformers": "transformers", "transformers-sync": "transformers", "vllm": "vllm"}
_BLOCK_TOKENS = 256
_WARMUP_TOKENS = 32
_MAX_ERROR_CHARS = 300
_LOG_END_CHARS = 2000
# The line that ends a traceback, maybe after the name of the process or rank that wrote it. vLLM's
# own last one says that the cause is above; it is not the cause.
_EXCEPTION = re.compile(r"(?:\([^)]*\) |\[[^]]*\]: ?)*([\w.]+(?:Error|Exception)(?:: .*|:?$))")
_NO_CAUSE = "See root cause above"


class PeerFailed(GraphEngineError):
    """log_end: the last of what its processes wrote."""

    def __init__(self, message: str, log_end: str) -> None:
        super().__init__(message)
        self.log_end = log_end


def check_installed(peers: Sequence[str]) -> None:
    """Raises ConfigError for one of PEERS that is not."""
    for peer in peers:
        package = PEERS[peer]
        if find_spec(package) is None:
            raise ConfigError(
                f"{package} is not installed; pip install {package}, or leave --peer {peer} out"
            )


def measure_peer(
    peer: str, model_path: Path, workloads: dict[str, Lengths], vocab_size: int, *, repeats: int
) -> dict[str, Json]:
    """Figures of each workload, in the result file's form. One process serves all workloads, so
    that one start pays for all. Raises PeerFailed: how the process ended, and its last
    exception or line."""
    job = {
        "peer": peer,
        "model": str(model_path),
        "repeats": repeats,
        "workloads": {
            name: {"prompts": token_ids(lengths, vocab_size), "news": [new for _, new in lengths]}
            for name, lengths in workloads.items()
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        file.write_text(json.dumps(job))
        log = Path(folder) / "log.txt"
        with log.open("wb") as output:
            # Not pipes: the processes a peer leaves behind would hold them open for ever.
            process = subprocess.Popen(
                [sys.executable, "-m", "perf.peers", str(file), str(answer)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode or not answer.is_file():
            text = log.read_text("utf-8", "replace")
            message = f"peer {peer} failed ({describe_exit(process.returncode)})"
            if cause := last_error(text):
                message += f": {cause[:_MAX_ERROR_CHARS]}"
            raise PeerFailed(message, text[-_LOG_END_CHARS:])
        seconds: Json = json.loads(answer.read_text())
    found = {}
    for name, lengths in workloads.items():
        num_out, steps = sum(new for _, new in lengths), max(new for _, new in lengths)
        repeats_found = [
            {
                "total_s": (total_s, "s", "lower"),
                "out_tok_per_s": (num_out / total_s, "tok/s", "higher"),
                "ms_per_step": (1e3 * total_s / steps, "ms", "lower"),
            }
            for total_s in seconds["seconds"][name]
        ]
        found[name] = {"figures": merge(repeats_found), "detail": {"version": seconds["version"]}}
    return found


def last_error(log: str) -> str:
    """The last exception of a log that tells a cause, else its last line, "" if there is none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        found = _EXCEPTION.fullmatch(line)
        if found and _NO_CAUSE not in line:
            return found[1]
    return lines[-1] if lines else ""


def _child(job_file: Path, answer_file: Path) -> None:
    job: Json = json.loads(job_file.read_text())
    make = _vllm if job["peer"] == "vllm" else _transformers
    generate, version = make(job)
    seconds: dict[str, list[float]] = {}
    for name, workload in job["workloads"].items():
        prompts, news = workload["prompts"], workload["news"]
        generate(prompts, [min(new, _WARMUP_TOKENS) for new in news])
        seconds[name] = []
        for _ in range(job["repeats"]):
            start_s = time.perf_counter()
            counts = generate(prompts, news)
            seconds[name].append(time.perf_counter() - start_s)
            assert sorted(counts) == sorted(news), "the peer ended requests at other lengths"
    answer_file.write_text(json.dumps({"seconds": seconds, "version": version}))
    # Both peers leave threads or processes that can hang at exit.
    sys.stdout.flush()
    os._exit(0)


# Prompts and lengths -> the numbers of tokens generated, in any order.
Generate = Callable[[list[list[int]], list[int]], list[int]]


def _transformers(job: Json) -> tuple[Generate, str]:
    import torch
    import transformers

    hf: Any = transformers  # most of it has no types

    has_cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_default_device("cuda" if has_cuda else "cpu")
    model = hf.AutoModelForCausalLM.from_config(
        hf.AutoConfig.from_pretrained(job["model"]),
        dtype=torch.bfloat16 if has_cuda else torch.float32,
        attn_implementation="flash_attention_2" if has_cuda else "paged|sdpa",
    ).eval()
    torch.set_default_device("cpu")
    longest = [
        sum(
            math.ceil((len(p) + n) / _BLOCK_TOKENS) + 2
            for p, n in zip(w["prompts"], w["news"], strict=True)
        )
        for w in job["workloads"].values()
    ]
    options: Json = {
        "use_async_batching": has_cuda and job["peer"] == "transformers",
        # Both given: left alone, the library would size one from the other by free memory.
        "max_batch_tokens": 8192 if has_cuda else 512,
        "num_blocks": math.ceil(1.25 * max(longest)) + 32,
        "safety_margin": 0.0,
        # Repeats send the same prompts again; their prefills are to be measured, not skipped.
        "allow_block_sharing": False,
    }
    if has_cuda:
        options["use_cuda_graph"] = (True, True)
    else:
        options["max_blocks_per_request"] = 0  # block tables are for flash attention
    generation = hf.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=hf.generation.ContinuousBatchingConfig(**options),
    )
    manager.warmup()

    def generate(prompts: list[list[int]], news: list[int]) -> list[int]:
        manager.background_thread_status.clear()
        with torch.no_grad():
            for prompt, new in zip(prompts, news, strict=True):
                manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1)
            manager.start()
            counts: list[int] = []
            while len(counts) < len(prompts):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    if output.error is not None:
                        raise RuntimeError(output.error)
                    counts.append(len(output.generated_tokens))
                elif output is None and not manager.is_running():
                    raise RuntimeError(
                        f"it stopped: {manager.background_thread_status.fatal_error}"
                    )
            manager.stop(block=True, keep_for_next_session=True)
        return counts

    return generate, transformers.__version__


def _vllm(job: Json) -> tuple[Generate, str]:
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }.items():  # one host, maybe without a network
        os.environ.setdefault(name, value)
    import vllm

    longest = max(
        len(p) + n
        for w in job["workloads"].values()
        for p, n in zip(w["prompts"], w["news"], strict=True)
    )
    llm = vllm.LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=_BLOCK_TOKENS * math.ceil((longest + 8) / _BLOCK_TOKENS),
        enable_prefix_caching=False,
        generation_config="vllm",
    )

    def generate(prompts: list[list[int]], news: list[int]) -> list[int]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                vllm.SamplingParams(
                    temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
                )
                for new in news
            ],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate, vllm.__version__


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
