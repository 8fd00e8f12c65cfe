"""What is left of a perf run that is cut short, or whose peer fails? All that was measured."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli
import perf.environment
import perf.peers
import perf.run
from captures import CaptureReport
from graphengine import LLM
from graphengine.errors import ConfigError
from graphengine.model_runner import Launched
from graphengine.scheduler import DecodeBatch, PrefillBatch
from graphengine.sequence_table import SequenceTable
from perf.compare import load_side
from perf.figures import merge
from perf.host_loop import measure, without_model
from perf.peers import PeerFailed
from perf.run import trace_path
from perf.shapes import write_shape
from perf.step_probe import StepProbe
from perf.workloads import WORKLOADS, Lengths, Workload, largest_scale, scaled

RUN = ["perf", "run", "--model", "demo", "--scale", "0.015", "--repeats", "1", "--workload"]


def invoke(output: Path, *more: str) -> int:
    return CliRunner().invoke(cli.app, [*RUN, "latency", "--output", str(output), *more]).exit_code


def test_run_that_is_cut_short_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(perf.run, "measure_peer", interrupted)
    output = tmp_path / "result.json"
    assert invoke(output, "--peer", "transformers") == 130
    result = json.loads(output.read_text())
    assert result["workloads"]["latency"]["async"]["figures"]["total_s"]["median"] > 0
    assert result["config"]["attention"] == "auto"
    assert result["workloads"]["latency"]["async"]["detail"]["attention"] == "reference"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_peer_that_fails_is_named_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise PeerFailed("peer transformers failed: no room", "Traceback\nno room\n")

    monkeypatch.setattr(perf.run, "measure_peer", failing)
    output = tmp_path / "result.json"
    more = ["latency", "--output", str(output), "--peer", "transformers"]
    done = CliRunner().invoke(cli.app, [*RUN, *more])
    assert done.exit_code == 1
    result = json.loads(output.read_text())
    assert result["peer_errors"] == {"transformers": "peer transformers failed: no room"}
    assert result["peer_logs"] == {"transformers": "Traceback\nno room\n"}
    assert "latency" in result["workloads"]
    summary = json.loads(done.stdout)
    assert summary["peer_errors"] == result["peer_errors"]
    assert "latency" in summary["medians"]


def test_peer_that_is_not_installed_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf.peers, "find_spec", lambda name: None if name == "vllm" else object())
    more = ["latency", "--output", str(tmp_path / "r.json"), "--peer", "vllm"]
    done = CliRunner().invoke(cli.app, [*RUN, *more])
    assert done.exit_code == 2
    assert done.stderr == (
        "error: vllm is not installed; pip install vllm, or leave --peer vllm out\n"
    )
    assert list(tmp_path.iterdir()) == []


VLLM_LOG = """\
(EngineCore pid=7) ERROR 11-29 10:00:00 [core.py:700] torch.OutOfMemoryError: CUDA out of memory.
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "core.py", line 3, in run
(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.
Traceback (most recent call last):
  File "peers.py", line 1, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
LEAK = """\
resource_tracker.py:254: UserWarning: There appear to be 1 leaked semaphore objects
  warnings.warn('resource_tracker: There appear to be '
"""
# What a peer wrote and did last, and what is told of it.
PEER_ENDS = {
    "exception": (
        "File a\nValueError: few blocks\n\n",
        "exit 7",
        "(exit code 7): ValueError: few blocks",
    ),
    "root cause above": (
        VLLM_LOG,
        "exit 1",
        "(exit code 1): torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
    ),
    "warning last": (
        f"[rank0]: AssertionError\n{LEAK}",
        "exit 1",
        "(exit code 1): AssertionError",
    ),
    "killed": (
        "Exception ignored in: f\nLoading: 9%\rLoading: 100%",
        "kill -9 $$",
        "(killed by SIGKILL): Loading: 100%",
    ),
    "silent": ("", "exit 7", "(exit code 7)"),
    "no answer": ("", "exit 0", "(exit code 0)"),
}


@pytest.mark.parametrize(("log", "end", "words"), PEER_ENDS.values(), ids=PEER_ENDS)
def test_peer_that_failed_is_told_with_its_end_and_cause(
    log: str, end: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line was often the one that says nothing, and the log was gone."""
    log = log and "x" * 3000 + "\n" + log
    (tmp_path / "log").write_text(log, newline="")
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncat {tmp_path / 'log'}; {end}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(perf.peers.sys, "executable", str(fake))
    with pytest.raises(PeerFailed) as caught:
        perf.peers.measure_peer("vllm", tmp_path, {"latency": [(4, 8)]}, 100, repeats=1)
    assert str(caught.value) == f"peer vllm failed {words}"
    assert caught.value.log_end == log.replace("\r", "\n")[-2000:]


def test_result_that_cannot_be_kept_is_printed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    output = tmp_path / "result.json"
    done = CliRunner().invoke(cli.app, [*RUN, "latency", "--output", str(output)])
    assert done.exit_code == 2
    assert done.stderr.endswith(
        f"error: {output}: No space left on device; make room or write the output elsewhere\n"
    )
    assert "ms_per_step" in done.stderr
    assert list(tmp_path.iterdir()) == []
    printed = json.loads(done.stdout)
    assert printed["output"] is None
    assert printed["medians"]["latency"]["async"]["total_s"] > 0
    output.write_text(done.stdout)
    assert ("latency", "async", "total_s") in load_side(output).figures


def test_place_that_takes_no_file_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the permissions are there: on a full disk, and in /proc as root."""
    done = CliRunner().invoke(cli.app, [*RUN, "latency", "--output", "/proc/result.json"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

    def full(part: Path, data: bytes) -> None:
        part.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    output = tmp_path / "result.json"
    done = CliRunner().invoke(cli.app, [*RUN, "latency", "--output", str(output)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"error: {output}: No space left on device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_the_model_does_not_take_are_refused_with_a_scale_that_fits(
    tmp_path: Path,
) -> None:
    command = ["perf", "run", "--model", "demo", "--repeats", "1", "--scale", "0.05"]
    command += ["--workload", "decode-0.6b", "--workload", "decode-8b"]
    command += ["--output", str(tmp_path / "r.json")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2
    longest = "the longest sequence has 229 tokens, the model takes 64; "
    assert done.stderr == f"error: {longest}lower --scale to 0.0098\n"
    decode = WORKLOADS["decode-0.6b"]
    assert decode.max_len(0.0098) <= 64 < decode.max_len(0.0099)
    assert largest_scale([decode], 24) is None
    # Of which nothing would be left of the other.
    done = CliRunner().invoke(cli.app, [*command, "--workload", "latency"])
    assert done.exit_code == 2
    assert done.stderr == f"error: {longest}take other workloads\n"


NOTHING_LEFT = ", which leaves one token of each length of latency; give 0.012 to 0.4\n"
SCALES = {
    "1e300": "--scale is 1e+300; give a number above 0 and up to 1000\n",
    "1e308": "--scale is 1e+308; give a number above 0 and up to 1000\n",
    "nan": "--scale is nan; give a number above 0 and up to 1000\n",
    "-1": "--scale is -1.0; give a number above 0 and up to 1000\n",
    "1000": "the longest sequence has 160000 tokens, the model takes 64; lower --scale to 0.4\n",
    "1e-300": f"--scale is 1e-300{NOTHING_LEFT}",
    "0.011": f"--scale is 0.011{NOTHING_LEFT}",
}


@pytest.mark.parametrize(("scale", "line"), SCALES.items(), ids=SCALES)
def test_scale_that_leaves_nothing_or_too_much_is_refused(
    scale: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 0 ms was a result, and a number of 300 digits an error."""
    monkeypatch.setattr(perf.run, "_run_group", lambda *arguments: {})
    command = ["perf", "run", "--model", "demo", "--workload", "latency", "--scale", scale]
    done = CliRunner().invoke(cli.app, [*command, "--output", str(tmp_path / "r.json")])
    assert done.exit_code == 2
    assert done.stderr == f"error: {line}"
    assert list(tmp_path.iterdir()) == []


def test_least_scale_leaves_a_length() -> None:
    for workload in WORKLOADS.values():
        if workload.kind == "grid":
            assert workload.least_scale() == 0.0
        elif workload.kind != "startup":
            least = workload.least_scale()
            assert scaled(workload.longest(), least) == 2
            assert scaled(workload.longest(), least * 0.9) == 1


def test_start_up_has_no_lengths_to_refuse() -> None:
    """Its processes take a model of any length."""
    check = perf.run._check_lengths
    check(64, [WORKLOADS["startup"]], 1.0)
    check(64, [WORKLOADS["startup"], WORKLOADS["latency"]], 0.05)
    with pytest.raises(ConfigError, match="has 160 tokens, the model takes 64"):
        check(64, [WORKLOADS["startup"], WORKLOADS["latency"]], 1.0)


def test_workloads_of_one_model_share_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was one for each shape that they would else have."""
    make_llm = perf.run.make_llm
    made: list[list[str]] = []

    def counted(path: str, max_len: int, workloads: list[Workload], *more: Any) -> LLM:
        made.append([workload.name for workload in workloads])
        return make_llm(path, max_len, workloads, *more)

    monkeypatch.setattr(perf.run, "make_llm", counted)
    assert invoke(tmp_path / "result.json", "--workload", "prefill-8b") == 0
    assert made == [["latency", "prefill-8b"]]


def test_largest_scale_draws_each_workload_once() -> None:
    """Drawing `mixed` for every scale that was tried took two seconds."""
    draws: list[str] = []

    def counted(workload: Workload) -> Workload:
        def draw() -> Lengths:
            draws.append(workload.name)
            return workload.draw()

        return replace(workload, draw=draw)

    chosen = [WORKLOADS[name] for name in ("latency", "mixed-0.6b", "seed-8b")]
    assert largest_scale([counted(workload) for workload in chosen], 64) == 0.0076
    assert draws == [workload.name for workload in chosen]
    assert [max(w.max_len(scale) for w in chosen) for scale in (0.0076, 0.0077)] == [64, 65]


def test_random_weights_of_a_real_shape_are_refused_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said "warm-up", then nothing for as long as one waited."""
    monkeypatch.setattr(perf.run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(perf.run, "_run_group", lambda *arguments: {})
    command = ["perf", "run", "--workload", "decode-0.6b", "--output", str(tmp_path / "r.json")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: no GPU: ")
    assert "--model demo --scale 0.05 --workload latency\n" in done.stderr
    assert done.stderr.count("\n") == 1


SCRIPTS = ("jobs_kill", "jobs_gpus", "jobs_memory", "job_overhead", "engine_figures")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_look_at_their_output_first(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"perf.{script}", "--output", str(tmp_path / "no" / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"no directory {tmp_path / 'no'}; make it first" in done.stderr.splitlines()[-1]


def test_unknown_peer_is_refused_before_anything_runs(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert invoke(output, "--peer", "sglang") == 2
    assert not output.exists()


def test_every_mode_writes_a_trace_of_its_own(tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    more = ["--mode", "async", "--mode", "sync", "--trace", str(trace), "--workload", "prefill-8b"]
    assert invoke(tmp_path / "result.json", *more) == 0
    traces = [f"t.demo-{mode}.json" for mode in ("async", "sync")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", *traces]
    for name in traces:
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        assert {"schedule", "prefill"} <= {event["name"] for event in events}


def test_trace_never_takes_the_results_place(tmp_path: Path) -> None:
    """The name that was looked at is not the one that is written."""
    output = tmp_path / "t.demo-async.json"
    more = ["latency", "--output", str(output), "--trace", str(tmp_path / "t.json")]
    result = CliRunner().invoke(cli.app, [*RUN, *more])
    assert result.exit_code == 2
    assert f"--trace {output} is the file of --output {output}" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama-8b", "t.llama-8b-sync.json"),
        ("Qwen/Qwen3-0.6B", "t.Qwen3-0.6B-sync.json"),
        ("/models/mine/", "t.mine-sync.json"),
        (".", f"t.{Path.cwd().name}-sync.json"),
    ],
)
def test_trace_has_the_models_name(model: str, name: str) -> None:
    assert trace_path(Path("/a/t.json"), model, "sync") == Path("/a") / name


def test_peer_that_leaves_processes_behind_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's engine process outlives the one that was started, and held its pipes open."""
    fake = tmp_path / "python"
    left = tmp_path / "left"
    fake.write_text(
        f"#!/bin/sh\nsleep 300 & echo $! > {left}\n"
        'echo \'{"seconds": {"latency": [2.0]}, "version": "1"}\' > "$4"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(perf.peers.sys, "executable", str(fake))
    start_s = time.monotonic()
    found = perf.peers.measure_peer("vllm", tmp_path, {"latency": [(4, 8)]}, 100, repeats=1)
    assert time.monotonic() - start_s < 60
    assert found["latency"]["figures"]["out_tok_per_s"]["median"] == 4.0
    state = Path(f"/proc/{left.read_text().strip()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # killed, but not yet gone
        assert time.monotonic() - start_s < 60
        time.sleep(0.01)


def test_graphs_are_told_beside_the_batch_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU captures none; what a GPU has captured is put there."""
    make_llm = perf.run.make_llm

    def with_graphs(*arguments: Any) -> LLM:
        llm = make_llm(*arguments)
        llm.capture_report = CaptureReport({1: 0.25, 2: 0.5}, {1: 0, 2: 0}, 4)
        return llm

    monkeypatch.setattr(perf.run, "make_llm", with_graphs)
    output = tmp_path / "result.json"
    done = CliRunner().invoke(cli.app, [*RUN, "latency", "--output", str(output)])
    assert "2 batch sizes captured in 0.75 s, 4 graphs\n" in done.stderr
    detail = json.loads(output.read_text())["workloads"]["latency"]["async"]["detail"]
    assert (detail["num_buckets"], detail["num_graphs"]) == (2, 4)


def test_eager_was_busy_for_about_what_its_kernels_take_as_graphs() -> None:
    def measured(total_s: float, busy: float) -> dict[str, dict[str, object]]:
        values = {"total_s": (total_s, "s", "lower"), "gpu_busy": (busy, "of 1", "higher")}
        return {"figures": merge([values])}

    modes = {"async": measured(10.0, 0.98), "eager": measured(20.0, 0.95)}
    perf.run._estimate_eager_busy({"w": modes, "eager-alone": {"eager": measured(5.0, 0.9)}})
    assert modes["eager"]["figures"]["gpu_busy_estimate"]["median"] == pytest.approx(0.49)
    assert "gpu_busy_estimate" not in modes["async"]["figures"]


def test_limits_are_measured_at_their_own_points(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = ["perf", "run", "--model", "demo", "--scale", "0.05", "--repeats", "1"]
    command += ["--workload", "limits-0.6b", "--output", str(output)]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    figures = json.loads(output.read_text())["workloads"]["limits-0.6b"]["async"]["figures"]
    for point in ("1 x 13", "32 x 32", "256 x 26"):
        for name in ("device_ms", "step_ms", "bandwidth_share"):
            assert figures[f"{name}[{point}]"]["median"] > 0.0


def test_steady_workload_decodes_all_rows_from_start_to_end(tmp_path: Path) -> None:
    """So that its host time of a step is that of 256 rows: "mixed" empties towards its end."""
    workload = WORKLOADS["steady-0.6b"]
    assert workload.draw() == [(256, 512)] * 256
    scale = 0.25  # twice the tokens of one prefill step
    options = {"load_format": "dummy"}
    path = str(write_shape("tiny", tmp_path))
    llm = perf.run.make_llm(path, workload.max_len(scale), [workload], scale, options)
    rows: list[int] = []
    with llm:
        without_model(llm)
        launch = llm._runner.launch

        def watched(batch: DecodeBatch | PrefillBatch, table: SequenceTable) -> Launched:
            if isinstance(batch, DecodeBatch):
                rows.append(len(batch.rows))
            return launch(batch, table)

        llm._runner.launch = watched  # type: ignore[method-assign,assignment]
        values, detail = perf.run._requests(workload, llm, scale, 1e9)
    assert rows == [256] * 127
    assert (detail["num_decode_steps"], detail["num_prefill_steps"]) == (127, 2)
    assert values["host_ms_per_decode_step"][0] > 0.0
    assert values["host_ms_per_decode_step"][1:] == ("ms", "lower")


def test_steps_of_a_point_are_at_its_context_and_rows() -> None:
    contexts: list[float] = []
    places: list[tuple[int, int]] = []
    with LLM("demo", max_num_seqs=4, max_model_len=64, skip_tokenizer_init=True) as llm:
        probe = StepProbe(llm)
        launch = llm._runner.launch

        def watched(batch: DecodeBatch, table: SequenceTable) -> Launched:
            assert len(batch.rows) == 3
            contexts.extend(batch.context_lens.tolist())
            places.append((batch.num_steps_left, int(batch.context_lens[0]) % llm.block_size))
            launched = launch(batch, table)
            assert (table.block_tables[batch.rows, :2] > 0).all()
            return launched

        llm._runner.launch = watched  # type: ignore[method-assign,assignment]
        spans = probe.steps(3, 30)()
    assert sum(contexts) / len(contexts) == 30.5
    # A context that fills its block has no step left in it; one that begins one, all but its own.
    assert {left for left, place in places if place == 0} == {0}
    assert {left for left, place in places if place == 1} == {llm.block_size - 1}
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))


def test_host_is_measured_without_the_model() -> None:
    """Steps, batches and outputs are counted as they would be with it."""
    with LLM("demo", max_num_seqs=4, max_model_len=64, skip_tokenizer_init=True) as llm:
        without_model(llm)
        found = measure(llm, [(5, 7)] * 4 + [(9, 3)] * 4, sample_memory=True)
    assert (found["num_decode_steps"], found["num_prefill_steps"]) == (6 + 2, 2)
    assert found["median_ms"]["launch"] <= found["slowest_ms"]["launch"][-1]
    assert 0.0 < found["host_ms_per_decode_step"] < found["wall_ms_per_decode_step"]


def test_environment_names_both_packages_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf.environment, "_version", lambda _name: "1.0")
    assert {"flash-attn", "flash-attn-4"} <= set(perf.environment.environment()["packages"])


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_that_of_the_package_wherever_it_is_run_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHENGINE_COMMIT", raising=False)
    ours, users = tmp_path / "ours", tmp_path / "users"
    for folder in (ours, users):
        (folder / "graphengine").mkdir(parents=True)
        (folder / "graphengine" / "__init__.py").touch()
        git(folder, "init")
    git(ours, "add", ".")
    for folder in (ours, users):
        git(folder, "commit", "--allow-empty", "-m", "one")
    monkeypatch.chdir(users)
    init = ours / "graphengine" / "__init__.py"
    monkeypatch.setattr(perf.environment.graphengine, "__file__", str(init))
    found = perf.environment.environment()
    assert (found["commit"], found["is_dirty"]) == (git(ours, "rev-parse", "HEAD"), False)
    init.write_text("changed")
    assert perf.environment.environment()["is_dirty"]
    # Installed in a folder of a repository that is the user's.
    init = users / "graphengine" / "__init__.py"
    monkeypatch.setattr(perf.environment.graphengine, "__file__", str(init))
    found = perf.environment.environment()
    assert (found["commit"], found["is_dirty"]) == ("", None)


def test_given_commit_is_not_called_dirty_by_another_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy of a tree told the state of the repository that it lay in, or was."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(perf.environment, "_git", lambda *arguments: asked.append(arguments))
    monkeypatch.setenv("GRAPHENGINE_COMMIT", "abc")
    found = perf.environment.environment()
    assert (found["commit"], found["is_dirty"], asked) == ("abc", None, [])


def test_source_hash_is_that_of_the_tree_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "captures/b.py": "1",
        "graphengine/__init__.py": "",
        "graphengine/demo/model/config.json": "{}",
        "graphengine/kernels/a.cu": "é",
        "graphengine/kernels/a.cuh": "3",
        "graphengine_more.py": "no",
        "graphengine/kernels/a.cubin": "no",
        "perf/results/old.json": "no",
        "perf/run.py": "4",
    }

    def hash_of(folder: str, **changed: str) -> str:
        for name, text in (files | changed).items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text, "utf-8")
        init = tmp_path / folder / "graphengine" / "__init__.py"
        monkeypatch.setattr(perf.environment.graphengine, "__file__", str(init))
        return str(perf.environment.environment()["source_hash"])

    counted = sorted(name for name, text in files.items() if text != "no")
    lines = [f"{hashlib.sha256(files[name].encode()).hexdigest()}  {name}\n" for name in counted]
    first = hash_of("one")
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest()
    monkeypatch.chdir(tmp_path / "one" / "perf")
    assert hash_of("two") == hash_of("one") == first
    assert hash_of("three", **{"perf/results/new.json": "{}", "README.md": "new"}) == first
    (tmp_path / "three" / "captures" / ".#b.py").symlink_to("someone@somewhere")
    assert hash_of("three") == first
    assert hash_of("four", **{"graphengine/kernels/a.cu": "e"}) != first
    assert hash_of("five", **{"captures/c.py": ""}) != first
