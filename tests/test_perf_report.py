"""Does the page show what the files hold, load nothing, and survive files that hold nonsense?"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli
from graphengine.errors import ConfigError, InputError
from perf.recorded import read_result
from perf.report import build_report

pytest.importorskip("matplotlib")

Json = dict[str, Any]
# One of each kind: a page of all takes three times as long to draw.
SOME = ("seed-8b", "decode-8b", "startup")
# ms of a step on the device, and host time between two when nothing overlaps.
SPEEDS = {"async": (5.4, 0.0), "sync": (5.4, 0.62), "eager": (9.8, 0.55)}
WORK_MS = {"intake": 0.012, "schedule": 0.09, "launch": 0.14, "output": 0.03, "commit": 0.22}


def fig(value: float, unit: str, better: str) -> Json:
    samples = [value, 1.004 * value, 0.997 * value]
    return {
        "unit": unit,
        "better": better,
        "median": value,
        "low": min(samples),
        "high": max(samples),
        "samples": samples,
    }


def timeline(mode: str, num_steps: int = 14) -> list[Json]:
    """Steps as the engine's loop has them: overlapped, or one after the other."""
    draw = random.Random(mode)
    device_ms, idle_ms = SPEEDS[mode]
    spans, at_ms = [], 0.4
    for _ in range(num_steps):
        step_ms = device_ms * draw.uniform(0.995, 1.005)
        spans.append({"row": "device", "name": "decode", "start_ms": at_ms, "ms": step_ms})
        host_ms = at_ms + 0.05 if mode == "async" else at_ms - idle_ms + 0.05
        for phase, ms in WORK_MS.items():
            longer = 38.0 if mode == "eager" and phase == "launch" else 1.0
            ms *= longer * draw.uniform(0.8, 1.3)
            spans.append({"row": "host", "name": phase, "start_ms": host_ms, "ms": ms})
            host_ms += ms
        wait_ms = max(0.01, at_ms + step_ms - host_ms)
        spans.append({"row": "host", "name": "wait", "start_ms": host_ms, "ms": wait_ms})
        at_ms += step_ms + idle_ms + draw.uniform(0.004, 0.012)
    return spans


def run_workload(mode: str, rows: int, *, scale: float) -> Json:
    device_ms, idle_ms = SPEEDS[mode]
    step_ms = scale * (device_ms + idle_ms)
    spans = timeline(mode)
    for span in spans:
        span["start_ms"] *= scale
        span["ms"] *= scale
    host_ms = {phase: scale * ms for phase, ms in WORK_MS.items()} | {"wait": 4.7, "prefill": 31.0}
    idle = {} if mode == "async" else {phase: 2048 * ms for phase, ms in WORK_MS.items()}
    gap = {"at_s": 3.21, "ms": 1.9, "host_ms": {"prefill": 1.5, "schedule": 0.3, "outside": 0.1}}
    return {
        "figures": {
            "total_s": fig(2048 * step_ms / 1e3, "s", "lower"),
            "out_tok_per_s": fig(1e3 * rows / step_ms, "tok/s", "higher"),
            "ms_per_step": fig(step_ms, "ms", "lower"),
            "device_ms_per_decode_step": fig(scale * device_ms, "ms", "lower"),
            "host_ms_per_decode_step": fig(0.49, "ms", "lower"),
            "prefill_tflops": fig(512.3, "TFLOP/s", "higher"),
            "bandwidth_share": fig(0.823, "of 1", "higher"),
            "gpu_busy": fig(device_ms / (device_ms + idle_ms + 0.02), "of 1", "higher"),
        },
        "detail": {
            "num_requests": rows,
            "num_decode_steps": 2047,
            "num_prefill_steps": 1,
            "host_ms": host_ms,
            "idle_host_ms": idle or {"schedule": 3.0},
            "longest_gaps": [gap, {**gap, "ms": 0.4}],
            "memory": [
                {"at_s": 0.2 * i, "used_bytes": (122 << 30) + (i % 3 << 20)} for i in range(60)
            ],
            "timeline": spans,
        },
    }


def grid_workload(weight_gb: float, kv_token_mb: float, most_tokens: int) -> Json:
    figures = {}
    for context in (256, 1024, 4096):
        for rows in (1, 8, 32, 64, 128, 256):
            if rows * context > most_tokens:
                continue
            floor_ms = (weight_gb + 1e-3 * rows * context * kv_token_mb) / 4.42
            device_ms = floor_ms * 1.06 + 0.45 + 0.004 * rows
            at = f"[{rows} x {context}]"
            figures[f"device_ms{at}"] = fig(device_ms, "ms", "lower")
            figures[f"step_ms{at}"] = fig(device_ms + 0.01, "ms", "lower")
            figures[f"bandwidth_share{at}"] = fig(floor_ms / device_ms, "of 1", "higher")
    return {"figures": figures, "detail": {}}


def gpu_result(*names: str) -> Json:
    """As `perf run` on a GPU writes it, figures made up. names: of workloads, if not all."""
    start = {"python": 0.9, "imported": 3.4, "ready": 9.6, "first_token": 9.7}
    phases = {"config": 0.3, "tokenizer": 0.0, "weights": 3.6, "memory": 0.1, "graphs": 2.1}
    result: Json = {
        "schema": 1,
        "created": "2026-11-24T13:29:52+00:00",
        "environment": {
            "device": "NVIDIA H200",
            "python": "3.12.3",
            "cpu": "Some CPU",
            "num_cpus": 16,
            "commit": "2c85a433fa76ae532e985dabc7406fa2a9ca750c",
            "is_dirty": False,
            "packages": {"torch": "2.11.0+cu130", "triton": "3.6.0"},
            "cuda": "13.0",
            "gpu": {"driver_version": "580.1", "clocks.sm": "1980 MHz"},
        },
        "config": {"scale": 0.25, "repeats": 3, "modes": list(SPEEDS), "model": None},
        "read_bandwidth_bytes_per_s": 4.42e12,
        "workloads": {
            "seed-8b": {mode: run_workload(mode, 32, scale=1.0) for mode in SPEEDS},
            "mixed-0.6b": {mode: run_workload(mode, 256, scale=0.5) for mode in ("async", "sync")},
            "decode-8b": {"async": grid_workload(15.0, 0.131, 600_000)},
            "decode-0.6b": {"async": grid_workload(1.2, 0.1147, 900_000)},
            "latency": {"async": run_workload("async", 1, scale=0.2)},
            "startup": {
                "async": {
                    "figures": {"to_first_token_s[cold]": fig(12.1, "s", "lower")},
                    "detail": {
                        "phases": {
                            "cold": [{**start, "ready": 12.0, "first_token": 12.1}],
                            "warm": [{**start, "phases_s": phases}] * 3,
                        }
                    },
                }
            },
        },
        "peers": {
            "transformers": {
                "seed-8b": {"figures": {"total_s": fig(19.6, "s", "lower")}},
                "mixed-0.6b": {"figures": {"total_s": fig(14.2, "s", "lower")}},
            },
            "vllm": {
                "seed-8b": {
                    "figures": {
                        "total_s": fig(13.2, "s", "lower"),
                        "out_tok_per_s": fig(4976.0, "tok/s", "higher"),
                    }
                },
                "mixed-0.6b": {"figures": {"total_s": fig(5.56, "s", "lower")}},
            },
        },
    }
    for name in set(result["workloads"]) - set(names or result["workloads"]):
        del result["workloads"][name]
    return result


EMPTY: Json = {"schema": 1, "environment": {}, "config": {}, "workloads": {}}
SHORT: Json = {
    **EMPTY,
    "workloads": {"latency": {"async": {"figures": {"total_s": fig(1.0, "s", "lower")}}}},
}


def write(path: Path, result: object) -> Path:
    path.write_text(json.dumps(result), "utf-8")
    return path


def page_of(tmp_path: Path, *results: object) -> str:
    paths = [write(tmp_path / f"run{i}.json", result) for i, result in enumerate(results)]
    build_report(paths, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text("utf-8")


class Tags(HTMLParser):
    """Elements and attributes of a page, and the texts between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("report"), gpu_result(*SOME))


def test_page_is_well_formed_and_shows_every_part(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    titles = " | ".join(re.findall(r"<h3>(.*?)</h3>", page))
    for part in (
        "does the GPU wait for the host?",
        "against context, and its bandwidth floor",
        "output tokens a second",
        "Padding",
        "host time of a decode step",
        "Device memory",
        "first token",
        "multiple of each peer",
    ):
        assert part in titles
    text = " ".join(tags.texts)
    assert "NVIDIA H200" in text
    assert "2c85a433fa76" in text
    assert "GPU busy 99.6 %" in text
    assert "≤ 94.5 %" in text  # eager: gaps between kernels count as busy
    assert "4.42 TB/s" in text
    assert "580.1" in text


def test_tree_of_a_commit_that_was_told_is_named_by_its_sources(tmp_path: Path) -> None:
    result = gpu_result("latency")
    result["environment"] |= {"is_dirty": None, "source_hash": "5eed" * 16}
    text = page_of(tmp_path, result)
    assert "with local changes" not in text
    assert '<th>source_hash</th><td class="text">' + "5eed" * 16 in text
    assert '<th>is_dirty</th><td class="text">–</td>' in text


def test_page_loads_nothing(page: str) -> None:
    assert not re.search(r"https?:|//\w", page)
    assert "@import" not in page
    for tag, attributes in Tags(page).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name.endswith(("href", "src")):
                assert (value or "").startswith("#")
    assert all(url.startswith("#") for url in re.findall(r"url\((.*?)\)", page))


def test_ids_of_a_page_are_used_once(page: str) -> None:
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#(.*?)\)", page) + re.findall(r'href="#(.*?)"', page)
    assert used
    assert set(used) <= set(ids)


def test_colours_are_variables_with_a_dark_value(page: str) -> None:
    svg = page[page.index("<svg") :]
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    for name in set(re.findall(r"var\(--([\w-]+)\)", page)):
        assert page.count(f"--{name}:#") == 2, name


def test_every_figure_is_in_the_tables_with_median_range_and_count(page: str) -> None:
    assert "<code>out_tok_per_s</code> ↑</td><td>5,926 tok/s</td>" in page
    assert '<td class="range">5,908 – 5,950 tok/s</td><td>3</td>' in page
    result = gpu_result(*SOME)
    for modes in result["workloads"].values():
        for measured in modes.values():
            for name in measured["figures"]:
                assert f"<code>{name}</code>" in page
    assert '<b class="ratio">1.19 x</b>' in page  # 5,926 tok/s over vllm's 4,976


def test_same_files_give_the_same_page(tmp_path: Path) -> None:
    """So that a page in git changes only with its figures."""
    result = gpu_result("latency")
    assert page_of(tmp_path, result) == page_of(tmp_path, result)


def test_pngs_are_made_and_small(tmp_path: Path) -> None:
    path = write(tmp_path / "h200.json", gpu_result("decode-8b", "latency"))
    written = build_report([path], tmp_path / "report.html", tmp_path / "png")
    names = {file.name for file in (tmp_path / "png").iterdir()}
    assert {file.name for file in written[1:]} == names
    assert {"timeline.png", "context-decode-8b.png", "padding.png", "memory.png"} <= names
    for file in (tmp_path / "png").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "png" / "timeline.png").stat().st_size < 150_000


def test_parts_without_data_are_left_out(tmp_path: Path) -> None:
    result = gpu_result("latency")
    del result["peers"]
    result["workloads"] = SHORT["workloads"] | {"empty": {}}
    page = page_of(tmp_path, result)
    assert re.findall(r"<h3>(.*?):", page) == ["Padding"]
    assert "peer" not in page
    assert page.count("<svg") == 2  # the padding chart, wide and narrow
    assert "<code>total_s</code>" in page


def test_no_workloads_give_a_page_without_charts(tmp_path: Path) -> None:
    page = page_of(tmp_path, EMPTY)
    assert "<svg" not in page
    assert Tags(page).open == []


def test_single_samples_and_zeros_are_drawn(tmp_path: Path) -> None:
    result = gpu_result(*SOME)
    for modes in result["workloads"].values():
        for measured in modes.values():
            for figure in measured["figures"].values():
                figure.update(median=0.0, low=0.0, high=0.0, samples=[0.0])
            for span in measured.get("detail", {}).get("timeline", []):
                span.update(ms=0.0, start_ms=0.0)
    assert Tags(page_of(tmp_path, result)).open == []


def test_cpu_result_tells_no_gpu_share(tmp_path: Path) -> None:
    result = gpu_result("mixed-0.6b")
    del result["peers"]
    result["environment"]["device"] = "cpu"
    for modes in result["workloads"].values():
        for measured in modes.values():
            measured["figures"].pop("gpu_busy", None)
            for sample in measured["detail"].get("memory", []):
                sample["used_bytes"] = 0
    page = page_of(tmp_path, result)
    assert "GPU" not in page
    assert "Device memory in use" not in page
    assert "On the CPU a launch is the computation itself" in page


def test_files_stand_side_by_side(tmp_path: Path) -> None:
    base, new = gpu_result("latency", "startup"), gpu_result("latency")
    new["environment"]["commit"] = "f" * 40
    new["workloads"]["latency"]["async"]["figures"]["total_s"] = fig(1.5, "s", "lower")
    page = page_of(tmp_path, base, new)
    assert "<h2>run0 " in page
    assert "<h2>run1 " in page
    assert "ffffffffffff" in page
    row = re.search(r"<code>total_s</code> ↓</td>(.*?)</tr>", page)
    assert row is not None
    assert "2.21 s" in row[1]
    assert "1.50 s" in row[1]
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_same_stem_twice_keeps_both_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "run.json", SHORT)
    paths = [tmp_path / "a" / "run.json", tmp_path / "b" / "run.json"]
    written = build_report(paths, tmp_path / "report.html", tmp_path / "png")
    assert len(set(written)) == len(written) == 3


HOSTILE = (
    '<script>alert("x")</script>',
    "\"><img src=x onerror=alert(1)>'",
    "</text></svg><b>&amp;</b>",
    "$\\frac{1}{$ $x$",
    "\x1b[31m\x00\x07 \u202eabc\ud800",
    "../../etc/passwd",
    "日本語 🔥",
    "",
    "_hidden",
    "x" * 5000,
)
# Names that give the file its form; all others are soiled.
FORM = {
    *("schema", "created", "environment", "config", "workloads", "peers", "device"),
    *("read_bandwidth_bytes_per_s", "figures", "unit", "better", "median", "low", "high"),
    *("samples", "detail", "timeline", "row", "name", "start_ms", "ms", "memory", "at_s"),
    *("used_bytes", "phases", "phases_s", "host_ms", "idle_host_ms", "longest_gaps", "total_s"),
    *("num_decode_steps", "num_prefill_steps", "out_tok_per_s", "ms_per_step", "host", "launch"),
}


def soil(value: Any, number: Iterator[int]) -> Any:
    """Every string and name of a file replaced or followed by a hostile one, in turn."""
    if isinstance(value, dict):
        return {
            key
            if key in FORM or "[" in key
            else f"{next(number)}{HOSTILE[next(number) % len(HOSTILE)]}": soil(entry, number)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [soil(entry, number) for entry in value]
    if isinstance(value, str) and value not in ("host", "device", "decode"):
        return HOSTILE[next(number) % len(HOSTILE)]
    return value


def test_strings_of_a_file_are_text(tmp_path: Path) -> None:
    """Names of workloads, modes, phases, figures, peers and settings included."""
    result = gpu_result(*SOME)
    del result["workloads"]["seed-8b"]["eager"]
    result = soil(result, itertools.count())
    written = build_report(
        [write(tmp_path / "run.json", result)], tmp_path / "report.html", tmp_path / "out" / "png"
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "img"} & {tag for tag, _ in tags.elements}
    for tag, attributes in tags.elements:
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", page)
    assert '<script>alert("x")</script>' in " ".join(tags.texts)  # as text
    assert "x" * 300 not in page
    assert len(written) > 5
    assert all(file.parent == tmp_path / "out" / "png" for file in written[1:])


def test_hostile_file_name_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "<b>&$x$.json", SHORT)
    build_report([path], tmp_path / "report.html", tmp_path / "png")
    assert "<b>&lt;b&gt;&amp;$x$</b>" in (tmp_path / "report.html").read_text("utf-8")


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json' cannot be read \(No such file"):
        build_report([tmp_path / "none.json"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        build_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="no result files"):
        build_report([], tmp_path / "report.html")


@pytest.mark.parametrize(
    "text", ["", "{", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), "[" * 100_000]
)
def test_file_that_is_no_json_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, "latin-1")
    with pytest.raises(InputError, match="is no JSON") as caught:
        build_report([path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


BROKEN: list[tuple[tuple[str | int, ...], object, str]] = [
    (("schema",), 2, "schema is 2, expected 1"),
    (("workloads",), None, "workloads is None, expected an object"),
    (("workloads", "seed-8b", "async"), 3, "expected an object"),
    (("workloads", "seed-8b", "async", "figures", "total_s", "median"), "1", "total_s.median is"),
    (("workloads", "seed-8b", "async", "figures", "total_s", "low"), float("nan"), "low is nan"),
    (("workloads", "seed-8b", "async", "figures", "total_s", "high"), 10**400, "high is 1000"),
    (("workloads", "seed-8b", "async", "figures", "total_s", "high"), True, "high is True"),
    (("workloads", "seed-8b", "async", "detail", "timeline"), {}, "expected a list"),
    (("workloads", "seed-8b", "async", "detail", "timeline", 0, "ms"), None, r"timeline\[0\].ms"),
    (("workloads", "seed-8b", "async", "detail", "timeline", 0), {}, r"\[0\].start_ms is missing"),
    (("workloads", "seed-8b", "async", "detail", "memory", 1), [], r"memory\[1\] is \[\]"),
    (("workloads", "seed-8b", "async", "detail", "host_ms"), [1], "host_ms is"),
    (("environment",), "H200", "environment is 'H200'"),
    (("peers", "vllm", "seed-8b"), [], "expected an object"),
]


@pytest.mark.parametrize(("where", "value", "said"), BROKEN)
def test_broken_file_is_one_clear_error(
    tmp_path: Path, where: tuple[str | int, ...], value: object, said: str
) -> None:
    result: Any = copy.deepcopy(gpu_result())
    inner = result
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError, match=said) as caught:
        read_result(write(tmp_path / "run.json", result))
    assert "run.json" in str(caught.value)
    assert "perf run" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing",
    ["environment", "config", "workloads", "workloads.seed-8b.async.figures"],
)
def test_compare_and_report_refuse_the_same_file_in_the_same_words(
    tmp_path: Path, missing: str
) -> None:
    """A file without its config was drawn by one and broken for the other, one without figures
    was told without its workload by one and as None by the other."""
    result: Any = gpu_result()
    *places, name = missing.split(".")
    inner = result
    for place in places:
        inner = inner[place]
    del inner[name]
    path = str(write(tmp_path / "run.json", result))
    page = str(tmp_path / "page.html")
    for command in (["compare", path, path], ["report", path, "--output", page]):
        done = CliRunner().invoke(cli.app, ["perf", *command])
        assert done.exit_code == 2
        assert done.stderr.endswith(f": {missing} is missing; give a file that perf run wrote\n")
        assert done.stderr.count("\n") == 1


def test_page_never_replaces_a_result(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", SHORT)
    (tmp_path / "link.html").hardlink_to(path)
    for page in (tmp_path / "." / "run.json", tmp_path / "link.html"):
        with pytest.raises(ConfigError, match="also a result"):
            build_report([path], page)
    assert json.loads(path.read_text("utf-8")) == SHORT


def test_span_that_is_cut_off_tells_its_whole_time(page: str) -> None:
    """Not that of the part which is seen."""
    steps = [float(ms) for ms in re.findall(r"<title>decode ([\d.]+) ms</title>", page)]
    assert steps
    assert all(5.3 < ms < 5.5 or 9.7 < ms < 9.9 for ms in steps)
    gaps = [float(ms) for ms in re.findall(r"<title>idle ([\d.]+) ms</title>", page)]
    assert gaps
    assert all(ms < 0.02 or 0.55 < ms < 0.64 for ms in gaps)


def test_command_writes_page_and_pngs(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", SHORT)
    page, pngs = tmp_path / "page.html", tmp_path / "png"
    done = CliRunner().invoke(
        cli.app, ["perf", "report", str(path), "--output", str(page), "--png-dir", str(pngs)]
    )
    assert done.exit_code == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == {"output": str(page), "pngs": [str(pngs / "padding.png")]}
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_command_tells_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["perf", "report", str(tmp_path / "none.json")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_folder_of_pngs_that_is_a_file_is_told_by_its_own_name(tmp_path: Path) -> None:
    """The page was said to be at fault, and had been written."""
    path, page = write(tmp_path / "run.json", SHORT), tmp_path / "page.html"
    command = ["perf", "report", str(path), "--output", str(page), "--png-dir", str(path)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2
    assert done.stderr == f"error: --png-dir {path} is no directory (File exists); give another\n"
    assert not page.exists()
    assert json.loads(path.read_text("utf-8")) == SHORT


def test_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", EMPTY)
    with pytest.raises(ConfigError, match="cannot be written"):
        build_report([path], tmp_path / "none" / "report.html")


def test_missing_matplotlib_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "run.json", EMPTY)
    monkeypatch.setattr("perf.report.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'in the clone: pip install -e "\.\[report\]"'):
        build_report([path], tmp_path / "report.html")
