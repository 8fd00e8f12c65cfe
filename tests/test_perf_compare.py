"""Is a slow-down found and noise let pass? The statistic on recorded samples, and the command."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import perf.compare
import perf.run
import perf.step_probe
from cli import app
from graphengine.errors import InputError
from perf.compare import Samples, gates, load_side, verdict_of
from perf.workloads import WORKLOADS

Json = dict[str, Any]
LIMIT = 0.05

# Total milliseconds of five repeats in each of 20 runs of `latency` on the demo model at scale 0.4,
# one after the other on two cores that other work kept busy; undisturbed it takes about 100.
BUSY = (
    (298, 341, 284, 316, 280),
    (303, 165, 266, 422, 397),
    (333, 171, 342, 369, 353),
    (292, 345, 334, 152, 332),
    (291, 159, 377, 439, 391),
    (439, 363, 333, 334, 320),
    (287, 399, 286, 308, 279),
    (342, 459, 357, 305, 247),
    (394, 299, 229, 306, 194),
    (319, 354, 427, 569, 482),
    (416, 243, 293, 144, 300),
    (310, 356, 304, 179, 293),
    (430, 551, 503, 317, 171),
    (336, 303, 207, 261, 390),
    (320, 335, 488, 440, 340),
    (396, 217, 455, 584, 541),
    (477, 572, 475, 596, 482),
    (548, 662, 673, 730, 684),
    (629, 454, 547, 528, 488),
    (426, 388, 457, 488, 387),
)
# Microseconds of a decode step at scale 0.2: ten rounds of four repeats in which three sides took
# turns, other work on one core. The first two are the same code; in the third a step spins for 10 %
# of its time.
BASE = (
    (3496, 2745, 3495, 2402),
    (3082, 2454, 1964, 3516),
    (1569, 4610, 1556, 1607),
    (1554, 1787, 1696, 1509),
    (1873, 1771, 2932, 1866),
    (1593, 1643, 1663, 1655),
    (1692, 1634, 1560, 1629),
    (1569, 1586, 1561, 1512),
    (1560, 1602, 1511, 1593),
    (1519, 1529, 1519, 1553),
)
UNCHANGED = (
    (2878, 1900, 1940, 1935),
    (1805, 1680, 1658, 3410),
    (1589, 1513, 2835, 2155),
    (1632, 1549, 1617, 2623),
    (2044, 1565, 1623, 1647),
    (1614, 1632, 1626, 1767),
    (1596, 1531, 1526, 1542),
    (1686, 2000, 1941, 1774),
    (1567, 1534, 1929, 2164),
    (1603, 1567, 1589, 1680),
)
SLOWED = (
    (2033, 4084, 2807, 2802),
    (2123, 1793, 3107, 1720),
    (1779, 2526, 1724, 2153),
    (1795, 1702, 1771, 1735),
    (1872, 1916, 1960, 1815),
    (2265, 1870, 1809, 1974),
    (1747, 1860, 1767, 1736),
    (2069, 1847, 1820, 1764),
    (1709, 1649, 1688, 1806),
    (1790, 1863, 1740, 1716),
)
# The best sample of each of 69 runs, two sides in turns, as test_perf_gate.py makes them, under a
# load of 3.5 on two cores: microseconds of a decode step, and of one that spins for 10 % of its
# time.
CROWDED = (
    3897,
    4234,
    2158,
    2273,
    1759,
    2519,
    4149,
    5054,
    4009,
    1924,
    4428,
    7445,
    2134,
    2828,
    2188,
    4120,
    4559,
    1933,
    1863,
    1679,
    4532,
    2141,
    1432,
    1650,
    3890,
    4193,
    1499,
    1449,
    2615,
    2197,
    1501,
    1540,
    5234,
    1842,
    2468,
    1997,
    1540,
    1594,
    1754,
    2018,
    2007,
    1571,
    1947,
    1737,
    3057,
    1557,
    1503,
    1504,
    3791,
    4119,
    1488,
    2067,
    1658,
    1446,
    1902,
    2666,
    1693,
    1887,
    1737,
    2658,
    1557,
    1543,
    1686,
    3100,
    1499,
    3102,
    1673,
    1850,
    2075,
)
CROWDED_SLOWED = (
    5790,
    5015,
    6802,
    4277,
    4651,
    4280,
    2187,
    5685,
    3376,
    5452,
    3010,
    2602,
    4503,
    5554,
    5018,
    7058,
    2068,
    1711,
    2085,
    3434,
    3998,
    2065,
    1977,
    2350,
    1861,
    1977,
    1668,
    1587,
    2127,
    1974,
    1936,
    4401,
    7423,
    2238,
    4808,
    4291,
    4636,
    2419,
    1898,
    2256,
    1888,
    4387,
    1797,
    4114,
    1856,
    1789,
    1678,
    1652,
    1833,
    3355,
    1695,
    1890,
    3215,
    1751,
    1975,
    3144,
    2186,
    1882,
    4176,
    3545,
    1921,
    2052,
    3948,
    3179,
    1627,
    3024,
    2233,
    3362,
    1786,
)


def ms(values: Iterable[float]) -> Samples:
    return Samples("ms", "lower", tuple(values))


def is_alarm(base: Iterable[float], new: Iterable[float]) -> bool:
    return verdict_of(ms(base), ms(new), LIMIT) == "SLOWER"


def test_recorded_runs_that_took_turns_are_judged_right() -> None:
    base, unchanged, slowed = (tuple(map(min, runs)) for runs in (BASE, UNCHANGED, SLOWED))
    assert verdict_of(ms(base), ms(unchanged), LIMIT) == "ok"
    assert verdict_of(ms(base), ms(slowed), LIMIT) == "SLOWER"
    assert verdict_of(ms(slowed), ms(base), LIMIT) == "faster"
    assert verdict_of(ms(CROWDED), ms(CROWDED_SLOWED), LIMIT) == "SLOWER"
    # Fewer runs do not tell in such a crowd, and then nothing is claimed.
    assert verdict_of(ms(CROWDED[:20]), ms(CROWDED_SLOWED[:20]), LIMIT) == "noise"
    halves = CROWDED[::2], CROWDED[1::2]
    assert not is_alarm(*halves)
    assert not is_alarm(*halves[::-1])


@pytest.mark.parametrize(
    ("num_runs", "bound"), [(3, 0.05), (5, 1 / 252), (7, 1 / 3432), (10, 120 / 77520)]
)
def test_recorded_noise_alarms_as_seldom_as_the_rule_says(num_runs: int, bound: float) -> None:
    """Unchanged code under noise of three times the figure: sides of runs drawn from it."""
    draw = random.Random(0)
    best = [min(run) for run in BUSY]
    num_alarms = 0
    for _ in range(4000):
        drawn = draw.sample(best, 2 * num_runs)
        num_alarms += is_alarm(drawn[:num_runs], drawn[num_runs:])
    # Three standard deviations of the count above what is expected.
    expected = 4000 * bound
    assert num_alarms <= expected + 3 * expected**0.5 + 1


def test_two_runs_at_different_times_can_alarm_and_the_rate_is_known() -> None:
    """What folders of runs are for: the busy machine changed between the 20, which no two files
    tell. About one pair in ten alarms."""
    pairs = list(itertools.permutations(BUSY, 2))
    share = sum(is_alarm(base, new) for base, new in pairs) / len(pairs)
    assert 0.05 < share < 0.20


# Exponential noise on a floor, as a share of it: share, samples, power against 10 % at least.
NOISE = [(0.005, 3, 0.99), (0.02, 3, 0.95), (0.02, 5, 0.95), (0.05, 20, 0.99), (0.2, 40, 0.95)]


@pytest.mark.parametrize(("noise", "num_samples", "power"), NOISE)
def test_ten_percent_is_found_in_noise(noise: float, num_samples: int, power: float) -> None:
    draw = random.Random(0)

    def samples(factor: float) -> list[float]:
        return [factor * (1.0 + draw.expovariate(1.0 / noise)) for _ in range(num_samples)]

    rounds = range(1000)
    assert sum(is_alarm(samples(1.0), samples(1.1)) for _ in rounds) >= 1000 * power
    # 0.8 % at most where the noise is larger than the limit, and more than three samples.
    assert sum(is_alarm(samples(1.0), samples(1.0)) for _ in rounds) <= 8


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        ((1.0, 1.01, 1.02), (1.04, 1.04, 1.05), "ok"),
        ((1.0, 1.01, 1.02), (1.06, 1.07, 1.08), "SLOWER"),
        ((1.06, 1.07, 1.08), (1.0, 1.01, 1.02), "faster"),
        # Beyond the limit, but the base was seen as slow as that.
        ((1.0, 1.01, 1.10), (1.06, 1.07, 1.08), "noise"),
        # The neighbours' doing: only the best sample says what the program costs.
        ((1.0, 1.0, 1.0, 1.0), (1.01, 1.5, 1.6, 1.7), "noise"),
        # Of many samples the worst do not count.
        ((1.0,) * 7 + (1.3,), (1.1,) * 8, "SLOWER"),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "ok"),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "SLOWER"),
    ],
)
def test_verdicts(base: tuple[float, ...], new: tuple[float, ...], verdict: str) -> None:
    assert verdict_of(ms(base), ms(new), LIMIT) == verdict
    if 0.0 not in base:
        rates = [Samples("tok/s", "higher", tuple(1.0 / x for x in side)) for side in (base, new)]
        assert verdict_of(*rates, LIMIT) == verdict


def test_only_times_and_rates_gate() -> None:
    assert gates("total_s", "s")
    assert gates("out_tok_per_s", "tok/s")
    assert gates("device_ms[1 x 256]", "ms")
    assert not gates("host_ms_per_decode_step", "ms")
    assert not gates("bandwidth_share", "of 1")
    assert not gates("prefill_tflops", "TFLOP/s")


# --- the command


def result(factor: float = 1.0, num_samples: int = 5) -> Json:
    """Contents of a result file; `factor` slows it down."""

    def figure(value: float, unit: str, better: str) -> Json:
        samples = [value * (1.0 + 0.002 * number) for number in range(num_samples)]
        return {"unit": unit, "better": better, "median": value, "samples": samples}

    return {
        "schema": 1,
        "environment": {
            "device": "cpu",
            "python": "3.11.7",
            "platform": "Linux",
            "cpu": "EPYC",
            "num_cpus": 2,
            "commit": "abc",
            "is_dirty": False,
            "packages": {"torch": "2.11"},
            "cuda": None,
            "gpu": {},
        },
        "config": {"scale": 0.5, "repeats": num_samples, "modes": ["async"], "model": "demo"},
        "workloads": {
            "latency": {
                "async": {
                    "figures": {
                        "total_s": figure(factor, "s", "lower"),
                        "out_tok_per_s": figure(100.0 / factor, "tok/s", "higher"),
                        "gpu_busy": figure(0.9 / factor, "of 1", "higher"),
                    },
                    "detail": {"num_requests": 1, "prompt_tokens": 16, "output_tokens": 64},
                }
            }
        },
    }


def write(path: Path, contents: Json) -> Path:
    path.write_text(json.dumps(contents))
    return path


def run_compare(base: Path, new: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["perf", "compare", str(base), str(new), *options])


def test_slower_figure_is_named_and_exits_with_one(tmp_path: Path) -> None:
    base, new = write(tmp_path / "a", result()), write(tmp_path / "b", result(1.1))
    outcome = run_compare(base, new)
    assert outcome.exit_code == 1
    summary = json.loads(outcome.stdout.splitlines()[-1])
    assert summary["slower"] == ["latency async total_s", "latency async out_tok_per_s"]
    assert summary["figures"][0]["ratio"] == pytest.approx(1.1)
    assert [row["verdict"] for row in summary["figures"]] == ["SLOWER", "SLOWER", "info"]
    assert "SLOWER" in outcome.stderr
    assert run_compare(new, base).exit_code == 0
    assert run_compare(base, base).exit_code == 0


@pytest.mark.parametrize(
    ("limit", "code"), [("15%", 0), ("0.15", 0), ("5%", 1), ("0.05", 1), ("0", 1)]
)
def test_limit_is_a_share_or_percent(tmp_path: Path, limit: str, code: int) -> None:
    base, new = write(tmp_path / "a", result()), write(tmp_path / "b", result(1.1))
    assert run_compare(base, new, "--max-regression", limit).exit_code == code


@pytest.mark.parametrize("limit", ["", "%", "five", "-5%", "100%", "nan", "5"])
def test_limit_that_is_none_is_refused(tmp_path: Path, limit: str) -> None:
    base = write(tmp_path / "a", result())
    outcome = run_compare(base, base, f"--max-regression={limit}")
    assert outcome.exit_code == 2
    assert "as 5% or 0.05" in outcome.stderr


# Where a value sits, what it is in the new file, and what the refusal says.
REFUSED = {
    "device": (("environment", "device"), "NVIDIA H200", "device is cpu in"),
    "cpu": (("environment", "cpu"), "Xeon", "cpu is EPYC in"),
    "cores": (("environment", "num_cpus"), 64, "number of CPUs is 2 in"),
    "scale": (("config", "scale"), 1.0, "scale is 0.5 in"),
    "model": (("config", "model"), None, "model is demo in"),
    "modes": (("config", "modes"), ["sync"], "modes is ['async'] in"),
    "lengths": (
        ("workloads", "latency", "async", "detail", "output_tokens"),
        65,
        "latency has 1 requests, 16 prompt and 64 output tokens in",
    ),
    "schema": (("schema",), 2, "has schema 2"),
    "no object": (("environment",), [], "environment is [], expected an object; give a file"),
    "broken": (("workloads",), [], "a broken result"),
    "not a number": (
        ("workloads", "latency", "async", "figures", "total_s", "samples"),
        [1.0, float("nan")],
        "a broken result",
    ),
    "few repeats": (
        ("workloads", "latency", "async", "figures", "total_s", "samples"),
        [1.0, 1.0],
        "has 2 samples of latency async total_s, a verdict needs 3",
    ),
    "nothing in common": (("workloads",), {}, "have no figure in common"),
    "other unit": (
        ("workloads", "latency", "async", "figures", "total_s", "unit"),
        "ms",
        "latency async total_s is in s in",
    ),
}


@pytest.mark.parametrize(("place", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_unlike_or_broken_results_are_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    changed = copy.deepcopy(result())
    inner: Any = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    outcome = run_compare(write(tmp_path / "a", result()), write(tmp_path / "b", changed))
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


def test_fault_of_our_own_is_not_told_as_one_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any KeyError was a missing entry."""

    def faulty(contents: Json, where: str) -> Samples:
        raise KeyError("ours")

    monkeypatch.setattr(perf.compare, "_samples", faulty)
    with pytest.raises(KeyError, match="ours"):
        load_side(write(tmp_path / "a", result()))


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", "[" * 100_000])
def test_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b").write_text(text)
    outcome = run_compare(write(tmp_path / "a", result()), tmp_path / "b")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"error: {tmp_path / 'b'}: ")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    outcome = run_compare(tmp_path / "none", tmp_path / "none")
    assert outcome.exit_code == 2
    assert "none: No such file or directory" in outcome.stderr


def test_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    done = run_compare(tmp_path / ("x" * 300), tmp_path)
    assert done.exit_code == 2
    assert "File name too long; give a result or a folder" in done.stderr


def test_changed_versions_are_printed_and_compared(tmp_path: Path) -> None:
    new = result()
    new["environment"] |= {"commit": "def", "packages": {"torch": "2.12", "triton": "3.4"}}
    new["environment"]["gpu"] = {"driver_version": "580"}
    outcome = run_compare(write(tmp_path / "a", result()), write(tmp_path / "b", new))
    assert outcome.exit_code == 0
    for change in ("commit: abc -> def", "torch: 2.11 -> 2.12", "triton: None -> 3.4"):
        assert f"changed: {change}\n" in outcome.stderr
    assert "changed: driver: None -> 580\n" in outcome.stderr


def test_trees_of_one_commit_are_told_apart_by_their_sources(tmp_path: Path) -> None:
    """A commit that was told says nothing of a tree's changes. Files before have no hash."""
    old, new = result(), result()
    new["environment"] |= {"is_dirty": None, "source_hash": "5eed"}
    outcome = run_compare(write(tmp_path / "a", old), write(tmp_path / "b", new))
    assert outcome.exit_code == 0
    assert "changed: sources: None -> 5eed\n" in outcome.stderr
    assert "changed: uncommitted changes: False -> None\n" in outcome.stderr


def test_figures_of_one_side_are_named(tmp_path: Path) -> None:
    new = result()
    figures = new["workloads"]["latency"]["async"]["figures"]
    figures["other_s"] = figures.pop("total_s")
    outcome = run_compare(write(tmp_path / "a", result()), write(tmp_path / "b", new))
    assert outcome.exit_code == 0
    assert "only in base: latency async total_s\n" in outcome.stderr
    assert "only in new: latency async other_s\n" in outcome.stderr
    assert json.loads(outcome.stdout)["only_new"] == ["latency async other_s"]


@pytest.mark.parametrize("reader", ["full", "closed"])
def test_summary_that_nobody_takes_is_no_verdict(tmp_path: Path, reader: str) -> None:
    """Python ends with 1 for both, which is what a slower figure ends with."""
    base = str(write(tmp_path / "a", result()))
    if reader == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        end, out = os.pipe()
        os.close(end)
    command = [sys.executable, "-m", "cli", "perf", "compare", base, base]
    done = subprocess.run(
        command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    os.close(out)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: standard output"), done.stderr
    assert "Traceback" not in done.stderr


def test_table_that_nobody_takes_is_no_error(tmp_path: Path) -> None:
    base = str(write(tmp_path / "a", result()))
    command = [sys.executable, "-m", "cli", "perf", "compare", base, base]
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=full, text=True, check=False, timeout=60
        )
    assert done.returncode == 0
    assert json.loads(done.stdout)["slower"] == []


def folder(path: Path, factors: Iterable[float]) -> Path:
    path.mkdir()
    for number, factor in enumerate(factors):
        write(path / f"{number}.json", result(factor))
    return path


def test_folder_counts_the_best_of_each_run(tmp_path: Path) -> None:
    side = load_side(folder(tmp_path / "a", (1.0, 2.0, 3.0)))
    assert side.figures["latency", "async", "total_s"].values == (1.0, 2.0, 3.0)
    rates = side.figures["latency", "async", "out_tok_per_s"].values
    assert rates == pytest.approx((100.8, 50.4, 33.6))
    slow = folder(tmp_path / "b", (3.4, 3.5, 3.6))
    assert run_compare(tmp_path / "a", slow).exit_code == 1
    assert run_compare(tmp_path / "a", folder(tmp_path / "c", (2.9, 3.5, 3.6))).exit_code == 0


def test_folder_of_unlike_runs_is_refused(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "a", (1.0, 1.0))
    other = result()
    other["environment"]["commit"] = "def"
    write(mixed / "2.json", other)
    with pytest.raises(InputError, match="are of two commits"):
        load_side(mixed)
    other = result()
    del other["workloads"]["latency"]["async"]["figures"]["total_s"]
    write(mixed / "2.json", other)
    with pytest.raises(InputError, match="have different figures"):
        load_side(mixed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.json file"):
        load_side(tmp_path / "empty")


# --- perf run


def units_told() -> dict[str, str]:
    """By figure, as docs/figures.md tells what each one means."""
    text = (Path(__file__).parent.parent / "docs" / "figures.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    return {name: unit for names, unit in rows for name in re.findall(r"`([^`]+)`", names)}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs_on_the_demo_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf.run, "read_bandwidth", lambda: 1e10)
    # 24 steps at each of 18 points take a quarter of a minute.
    monkeypatch.setattr(perf.step_probe, "GRID_STEPS", 2)
    output = tmp_path / "result.json"
    scale = max(0.004, WORKLOADS[name].least_scale())
    outcome = CliRunner().invoke(
        app,
        f"perf run --workload {name} --model demo --scale {scale} --repeats 1 --output {output}",
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.count("\n") == 1
    summary = json.loads(outcome.stdout)
    assert summary["output"] == str(output)
    written = json.loads(output.read_text())["workloads"]
    assert list(written) == list(summary["medians"]) == [name]
    figures = written[name]["async"]["figures"]
    assert summary["medians"][name]["async"] == {
        key: figure["median"] for key, figure in figures.items()
    }
    told = units_told()
    for key, figure in figures.items():
        assert told[re.sub(r"\[\d+ x \d+\]", "[ROWS x CONTEXT]", key)] == figure["unit"]
    assert all(key in outcome.stderr for key in figures), "the table is cut"
    assert load_side(output).figures.keys() == {(name, "async", key) for key in figures}


BAD_RUNS = {
    "workload": (["--workload=fast"], "no workload 'fast'; choose from seed-8b"),
    "mode": (["--mode=slow"], "no mode 'slow'; choose from async, sync, eager"),
    "scale": (["--scale=0"], "--scale is 0.0; give a number above 0"),
    "nan": (["--scale=nan"], "--scale is nan"),
    "repeats": (["--repeats=0"], "--repeats is 0; give 1 or more"),
    "output": (["--output=/none/out.json"], "no directory /none"),
    "trace": (["--trace=/none/t.json"], "error: --trace /none/t.json: no directory /none"),
    "standard output": (["--output=-"], "--output is -, where the summary goes"),
}


@pytest.mark.parametrize(("options", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_options_of_run_are_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["perf", "run", "--model=demo", f"--output={tmp_path / 'out.json'}", *options]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
