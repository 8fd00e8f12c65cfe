"""How fast is it? Runs workloads in interleaved repeats and gathers their figures."""

from __future__ import annotations

import datetime
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graphengine import LLM, Request, SamplingParams
from graphengine.config import EngineConfig
from graphengine.errors import ConfigError, GraphEngineError
from graphengine.hub import resolve_model
from graphengine.model_config import load_model_config
from graphengine.output_file import check_apart, check_output_path, one_line
from perf.energy import energy_counter
from perf.environment import environment, gpu_state, read_bandwidth
from perf.figures import merge
from perf.peers import PEERS, PeerFailed, check_installed, measure_peer
from perf.recorded import SCHEMA
from perf.script import check_names
from perf.shapes import SHAPES, write_shape
from perf.startup import measure_startup
from perf.step_probe import StepProbe, Values
from perf.workloads import WORKLOADS, Lengths, Workload, largest_scale, scaled, token_ids

MODES = {
    "async": {},
    "sync": {"async_scheduling": False},
    "eager": {"async_scheduling": False, "enforce_eager": True},
}
Json = dict[str, Any]
# Lengths of the run that warms up, of those measured: enough for every kernel and buffer.
_WARMUP_SHARE = 0.25


def run(
    names: list[str],
    *,
    model: str | None,
    scale: float,
    repeats: int,
    modes: list[str],
    say: Callable[[str], None],
    attention: str = EngineConfig.attention,
    peers: Sequence[str] = (),
    save: Callable[[Json], None] = lambda result: None,
    trace: Path | None = None,
    output: Path | None = None,
) -> Json:
    """The result file's contents: docs/figures.md tells what each figure means.

    attention: EngineConfig's, of all but "startup".
    model: a checkpoint instead of each workload's random-weight shape. Workloads of one model and
    mode share an engine, and their repeats take turns, so that a drift of the machine falls on all
    alike. `save` is called with what there is after each of these groups, since a run of minutes
    may be cut short. Each of these engines writes a trace beside `trace`, its model and mode in the
    name, but none to `output`, where `save` writes. Raises ConfigError for a workload, mode or peer
    that does not exist or is not there, for a trace that cannot be written there, for lengths that
    the model does not take or of which nothing is left, and for a shape's random weights without a
    GPU."""
    check_names("workload", names, WORKLOADS)
    check_names("mode", modes, MODES)
    check_names("peer", peers, PEERS)
    check_installed(peers)
    chosen = [WORKLOADS[name] for name in names]
    if model is None and not torch.cuda.is_available():
        raise ConfigError(
            f"no GPU: torch sees no CUDA device, and {chosen[0].shape} is too large to measure on "
            "a CPU; give a --model, as in --model demo --scale 0.05 --workload latency"
        )
    groups: dict[str, list[Workload]] = {}
    for workload in chosen:
        groups.setdefault(model or workload.shape, []).append(workload)
    for shape, group in groups.items():
        _check_lengths(_limit_of(model, shape), group, scale)
    if trace is not None:
        traces = [str(trace_path(trace, shape, mode)) for shape in groups for mode in modes]
        _check_traces(traces, output)
    result: Json = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "config": {
            "scale": scale,
            "repeats": repeats,
            "modes": modes,
            "model": model,
            "attention": attention,
        },
        "read_bandwidth_bytes_per_s": read_bandwidth(),
        "workloads": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for shape, group in groups.items():
            path = model or str(write_shape(shape, Path(folder)))
            for mode in modes:
                engine_group = [workload for workload in group if workload.kind != "startup"]
                if engine_group:
                    say(f"{shape}, {mode}: making the engine")
                    options: Json = {**MODES[mode], "attention": attention}
                    if model is None:
                        options["load_format"] = "dummy"
                    if trace is not None:
                        options["trace"] = str(trace_path(trace, shape, mode))
                        say(f"trace: {options['trace']}")
                    found = _run_group(
                        engine_group,
                        path,
                        options,
                        mode,
                        scale,
                        repeats,
                        say,
                        result["read_bandwidth_bytes_per_s"],
                    )
                    for name, measured in found.items():
                        result["workloads"].setdefault(name, {})[mode] = measured
                    save(result)
            for workload in group:
                if workload.kind == "startup":
                    say(f"{workload.name}: starting processes")
                    found = measure_startup(model, workload.shape, Path(folder), repeats=repeats)
                    result["workloads"][workload.name] = {"async": found}
                    save(result)
            _estimate_eager_busy(result["workloads"])
            for peer in peers:
                try:
                    found = _run_peer(peer, group, resolve_model(path), scale, repeats, say)
                except GraphEngineError as error:
                    # Our own figures took their time; they are not thrown away for it.
                    result.setdefault("peer_errors", {})[peer] = str(error)
                    if isinstance(error, PeerFailed):
                        result.setdefault("peer_logs", {})[peer] = error.log_end
                    say("error: " + one_line(str(error)))
                    continue
                result.setdefault("peers", {}).setdefault(peer, {}).update(found)
                save(result)
    result["environment"]["gpu_after"] = gpu_state()
    return result


def _estimate_eager_busy(workloads: Json) -> None:
    """Adds to each eager run about what share of it its GPU was busy: the time that its kernels
    take as graphs. Its own events count the gaps between a step's kernels as busy. Where graphs
    start kernels before those before them have ended, the estimate is some per cent too low."""
    for modes in workloads.values():
        eager = modes.get("eager")
        replayed = modes.get("async") or modes.get("sync")
        if eager is None or replayed is None or "gpu_busy" not in eager["figures"]:
            continue
        figures = replayed["figures"]
        busy_s = figures["gpu_busy"]["median"] * figures["total_s"]["median"]
        eager["figures"] |= merge(
            [
                {"gpu_busy_estimate": (min(own, busy_s / total_s), "of 1", "higher")}
                for own, total_s in zip(
                    eager["figures"]["gpu_busy"]["samples"],
                    eager["figures"]["total_s"]["samples"],
                    strict=True,
                )
            ]
        )


def trace_path(trace: Path, model: str, mode: str) -> Path:
    """Where the engine of that model or shape writes: t.json -> t.llama-8b-async.json."""
    name = Path(model).expanduser().resolve().name  # of a directory, also "."; of a hub id
    return trace.with_name(f"{trace.stem}.{name}-{mode}{trace.suffix}")


def _check_traces(traces: list[str], output: Path | None) -> None:
    for path in traces:
        check_output_path(path, None, option="--trace")
        if output is not None:
            check_apart([("--trace", path), ("--output", str(output))])


def _limit_of(model: str | None, shape: str) -> int:
    """Tokens of the longest sequence that the model takes."""
    if model is None:
        return int(SHAPES[shape]["max_position_embeddings"])
    return load_model_config(resolve_model(model, with_weights=False)).max_position_embeddings


def _check_lengths(limit: int, workloads: list[Workload], scale: float) -> None:
    workloads = [workload for workload in workloads if workload.kind != "startup"]
    longest = max((workload.max_len(scale) for workload in workloads), default=0)
    leasts = {workload.name: workload.least_scale() for workload in workloads}
    name, least = max(leasts.items(), key=lambda item: item[1], default=("", 0.0))
    if longest <= limit and scale >= least:
        return
    fitting = largest_scale(workloads, limit)
    is_some = fitting is not None and fitting >= least
    if longest > limit:
        raise ConfigError(
            f"the longest sequence has {longest} tokens, the model takes {limit}; "
            + (f"lower --scale to {fitting:g}" if is_some else "take other workloads")
        )
    raise ConfigError(
        f"--scale is {scale:g}, which leaves one token of each length of {name}; "
        + (f"give {least:g} to {fitting:g}" if is_some else "take other workloads")
    )


def _run_group(
    workloads: list[Workload],
    path: str,
    options: Json,
    mode: str,
    scale: float,
    repeats: int,
    say: Callable[[str], None],
    bandwidth: float,
) -> dict[str, Json]:
    llm = make_llm(path, max(w.max_len(scale) for w in workloads), workloads, scale, options)
    try:
        # What the option has come to, as "auto" may to either.
        made: Json = {"attention": llm.attention}
        if llm.capture_report is not None:
            made["capture_s"] = llm.capture_report.total_s
            made["num_buckets"] = len(llm.capture_report.seconds)
            made["num_graphs"] = llm.capture_report.num_graphs
            say(
                f"{made['num_buckets']} batch sizes captured in {made['capture_s']:.2f} s, "
                f"{made['num_graphs']} graphs"
            )
        measured: dict[str, list[Values]] = {workload.name: [] for workload in workloads}
        details: dict[str, Json] = {}
        probe = StepProbe(llm) if any(w.kind == "grid" for w in workloads) else None
        for repeat in range(-1, repeats):  # the first warms up and is thrown away
            for workload in workloads:
                say(
                    f"{workload.name}, {mode}: "
                    + (f"repeat {repeat + 1}" if repeat >= 0 else "warm-up")
                )
                if workload.kind == "grid":
                    assert probe is not None
                    values = _grid(workload, llm, probe, scale, bandwidth)
                    detail: Json = {}
                else:
                    share = scale if repeat >= 0 else scale * _WARMUP_SHARE
                    values, detail = _requests(workload, llm, share, bandwidth)
                if repeat >= 0:
                    measured[workload.name].append(values)
                    details[workload.name] = detail | made
        return {
            name: {"figures": merge(values), "detail": details[name]}
            for name, values in measured.items()
        }
    finally:
        llm.close()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a peer takes its share of the memory in another process


def _run_peer(
    peer: str,
    workloads: list[Workload],
    path: Path,
    scale: float,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Json]:
    """A peer on those of the workloads that go through a whole engine, after ours has given its
    memory back. Nothing for a peer if there is none."""
    lengths = {w.name: w.lengths(scale) for w in workloads if w.kind == "run"}
    if not lengths:
        return {}
    say(f"{peer}: {', '.join(lengths)}")
    vocab_size = load_model_config(path).vocab_size
    return measure_peer(peer, path, lengths, vocab_size, repeats=repeats)


def make_llm(
    path: str, max_len: int, workloads: list[Workload], scale: float, options: Json
) -> LLM:
    """An engine whose KV cache holds what the workloads need at once, and not more."""
    limit = load_model_config(resolve_model(path)).max_position_embeddings
    max_num_seqs = max(
        [rows for workload in workloads for rows, _ in workload.points]
        + [min(256, len(workload.lengths(scale))) for workload in workloads]
    )
    return LLM(
        path,
        skip_tokenizer_init=True,
        max_model_len=min(limit, -(-max_len // 256) * 256),
        max_num_seqs=max_num_seqs,
        **options,
    )


def _requests(workload: Workload, llm: LLM, scale: float, bandwidth: float) -> tuple[Values, Json]:
    lengths = workload.lengths(scale)
    vocab_size = llm.model_config.vocab_size
    requests = [
        Request(
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True),
        )
        for ids, (_, new) in zip(token_ids(lengths, vocab_size), lengths, strict=True)
    ]
    joules = energy_counter() or (lambda: None)
    before = joules()
    with MemorySampler() as memory:
        outputs = list(llm.stream(requests))
    after = joules()
    errors = [output.error for output in outputs if output.error]
    if errors:
        raise ConfigError(f"{workload.name}: {len(errors)} requests failed, first: {errors[0]}")
    stats = llm.stats()
    num_out = sum(new for _, new in lengths)
    assert stats.output_tokens == num_out
    decode_s = 1e-3 * stats.decode_ms * stats.num_decode_steps
    prefill_s = 1e-3 * stats.prefill_ms * stats.num_prefill_steps
    values: Values = {
        "total_s": (stats.elapsed_s, "s", "lower"),
        "out_tok_per_s": (num_out / stats.elapsed_s, "tok/s", "higher"),
        "ms_per_step": (1e3 * stats.elapsed_s / max(new for _, new in lengths), "ms", "lower"),
        "device_ms_per_decode_step": (stats.decode_ms, "ms", "lower"),
        "host_ms_per_decode_step": (shadow_ms(stats.host_ms), "ms", "lower"),
        "prefill_tflops": (
            1e-12 * prefill_flops(llm, [p for p, _ in lengths]) / max(prefill_s, 1e-9),
            "TFLOP/s",
            "higher",
        ),
    }
    if decode_s > 0.0:
        num_bytes = stats.num_decode_steps * weight_bytes(llm) + kv_bytes_read(llm, lengths)
        values["bandwidth_share"] = (num_bytes / decode_s / bandwidth, "of 1", "higher")
    if stats.gpu_busy is not None:
        values["gpu_busy"] = (stats.gpu_busy, "of 1", "higher")
    detail: Json = {
        "num_requests": len(lengths),
        "prompt_tokens": sum(p for p, _ in lengths),
        "output_tokens": num_out,
        "num_decode_steps": stats.num_decode_steps,
        "num_prefill_steps": stats.num_prefill_steps,
        "host_ms": stats.host_ms,
        "idle_host_ms": stats.idle_host_ms,
        "longest_gaps": [
            {"at_s": gap.at_s, "ms": gap.ms, "host_ms": gap.host_ms} for gap in stats.longest_gaps
        ],
        "memory": memory.samples,
        "timeline": _timeline(llm),
    }
    if before is not None and after is not None:
        drawn = after - before
        detail |= {"joules": drawn, "watts": drawn / stats.elapsed_s}
    return values, detail


# Phases of the host in a decode step, prefills and waiting apart.
SHADOW = ("intake", "schedule", "launch", "output", "commit")


def shadow_ms(host_ms: dict[str, float]) -> float:
    """Host time of a decode step."""
    return sum(host_ms.get(name, 0.0) for name in SHADOW)


def _grid(workload: Workload, llm: LLM, probe: StepProbe, scale: float, bandwidth: float) -> Values:
    values: Values = {}
    for rows, context in workload.points:
        length = scaled(context, scale)
        if not probe.fits(rows, length):
            continue
        point = probe.measure(rows, length)
        values |= point
        device_ms = point[f"device_ms[{rows} x {length}]"][0]
        num_bytes = weight_bytes(llm) + rows * length * _kv_token_bytes(llm)
        values[f"bandwidth_share[{rows} x {length}]"] = (
            num_bytes / (1e-3 * device_ms) / bandwidth,
            "of 1",
            "higher",
        )
    return values


def weight_bytes(llm: LLM) -> int:
    """Bytes of weights one decode step must read: all but an embedding that is not the head too."""
    config = llm.model_config
    unread = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (config.num_parameters - unread) * llm.dtype_bytes


def kv_bytes_read(llm: LLM, lengths: Lengths) -> int:
    """Bytes of keys and values that the decode steps of these requests must read. The first output
    token comes from the prefill; the step that makes token i + 1 reads prompt + i tokens."""
    num_tokens = sum(prompt * (new - 1) + new * (new - 1) // 2 for prompt, new in lengths)
    return num_tokens * _kv_token_bytes(llm)


def _kv_token_bytes(llm: LLM) -> int:
    return llm.model_config.kv_bytes_per_token(llm.dtype_bytes)


def prefill_flops(llm: LLM, prompts: list[int]) -> float:
    """Arithmetic that the prefills stand for: two operations for each weight of the layers and
    token, causal attention, and the head once a prompt. The engine leaves out what nobody reads,
    the last layer's of all but each prompt's last token: by TFLOP/s it is credited for that."""
    config = llm.model_config
    heads = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    layers = config.num_parameters - heads
    attention = 2 * config.num_layers * config.num_heads * config.head_dim  # of each (q, k) pair x2
    return sum(
        2.0 * layers * n + attention * n * n + 2.0 * config.vocab_size * config.hidden_size
        for n in prompts
    )


class MemorySampler:
    """Device memory in use and KV share, a few times a second, while it is entered."""

    def __init__(self, interval_s: float = 0.2) -> None:
        self.samples: list[Json] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        start_s = time.perf_counter()
        while not self._stop.wait(self._interval_s):
            used = 0
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                used = total - free
            self.samples.append({"at_s": time.perf_counter() - start_s, "used_bytes": used})


def _timeline(llm: LLM) -> list[Json]:
    """The last steps of a run, host and device, from the first thing shown on."""
    laps, launches = llm.timeline()
    spans = [("host", lap.phase, lap.start_s, lap.end_s) for lap in laps]
    spans += [("device", *launch) for launch in launches]
    # From where both are known.
    begin_s = max(laps[0].start_s, launches[0][1]) if laps and launches else 0.0
    return [
        {"row": row, "name": name, "start_ms": 1e3 * (start - begin_s), "ms": 1e3 * (end - start)}
        for row, name, start, end in spans
        if start >= begin_s
    ]
