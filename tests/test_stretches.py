"""Are steps of the same rows counted as if each had written its own?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mutation import mutated
from rig import Rig, is_noticed, make_sequence, next_token, prompt_of, wrong

from graphengine.request import FinishReason
from graphengine.scheduler import DecodeBatch, PrefillBatch, Scheduler
from graphengine.sequence_table import SequenceTable
from graphengine.stretches import _MOST_STEPS, StepStretch, TokenStretch, _Dates


def long_ones(count: int, *, max_tokens: int = 100, **options: Any) -> Rig:
    """Sequences of 4 tokens each that nothing ends early."""
    rig = Rig(max_model_len=256, num_blocks=256, max_num_seqs=count + 1, **options)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=max_tokens) for i in range(count)))
    return rig


def turn(rig: Rig) -> None:
    """As the engine does: one step is in flight while the next is scheduled."""
    rig.schedule()
    if len(rig.in_flight) > 1:
        rig.commit()


def test_steps_in_which_nothing_happens_leave_the_table_alone() -> None:
    rig = long_ones(3)
    turn(rig)
    before = {name: getattr(rig.table, name).copy() for name in ("num_computed", "num_launched")}
    for _ in range(20):
        turn(rig)
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(rig.table, name), values)
    rows = rig.batches[-1].rows
    assert all(batch.rows is rows for batch in rig.batches[1:]), "its rows stay the same array"
    # The prompt and what it sampled; one step, since its rows might not have come again.
    assert rig.table.num_tokens[rows].tolist() == [6, 6, 6]
    rig.run()
    assert len(rig.finished) == 3
    assert wrong(rig.finished) == []


def test_rows_come_to_their_blocks_at_steps_of_their_own() -> None:
    """One after another within a stretch."""
    rig = Rig(max_model_len=64, num_blocks=64, max_num_seqs=4, block_size=4)
    made = [make_sequence(i, prompt_of(i, 4 + i), max_tokens=40) for i in range(4)]
    rig.add(*made)
    for _ in range(12):
        turn(rig)
    batch = rig.batches[-1]
    assert isinstance(batch, DecodeBatch)
    assert batch.context_lens.tolist() == [18, 17, 16, 15]
    assert rig.table.num_blocks[batch.rows].tolist() == [5, 5, 4, 4]
    rig.run()
    assert wrong(made) == []


def test_tokens_are_kept_for_so_many_steps_at_most() -> None:
    rig = long_ones(2, max_tokens=3 * _MOST_STEPS)
    most = 0
    for _ in range(2 * _MOST_STEPS + 20):
        turn(rig)
        tokens = rig.scheduler._tokens
        most = max(most, 0 if tokens is None else len(tokens._token_ids))
    assert most == _MOST_STEPS
    rig.run()
    assert wrong(rig.finished) == []


def ended_from_outside() -> bool:
    """Whether a sequence lacks tokens that were known when somebody ended it."""
    rig = long_ones(2)
    for _ in range(10):
        turn(rig)
    idx = int(rig.batches[-1].rows[0])
    ended = rig.scheduler.finish(idx, FinishReason.STOP)
    prefix = list(ended.prompt_token_ids)
    for _ in range(9):  # ten steps, one of them in flight
        prefix.append(next_token(prefix))
    return ended.output_token_ids != prefix[4:]


def preempted_in_mid_stretch() -> bool:
    """Whether anything is wrong where one of eight loses its blocks after many steps, and the
    others go on for some before it comes back."""
    rig = Rig(max_model_len=64, num_blocks=48, max_num_seqs=8, block_size=4)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=40) for i in range(8)))
    try:
        noticed = is_noticed(rig)
    except ValueError:  # arrays that do not fit each other
        return True
    assert rig.scheduler.num_preemptions > 0
    return noticed


def preempted_beside_one_that_ended() -> bool:
    """Whether anything is wrong where a stretch begins with one whose blocks are full and whose
    last token is in flight."""
    rig = Rig(max_num_seqs=3, block_size=2, num_blocks=16)
    lengths = ((11, 18), (8, 8), (7, 2))
    rig.add(*(make_sequence(i, prompt_of(i, p), max_tokens=n) for i, (p, n) in enumerate(lengths)))
    return is_noticed(rig, lag=2)


def kept_from_coming_back() -> bool:
    """Whether a preempted sequence does not come back at once when there are blocks for it."""
    rig = Rig(max_model_len=64, num_blocks=40, max_num_seqs=2, block_size=4)
    rig.check = lambda: None  # type: ignore[method-assign]  # some blocks are nobody's
    taken = rig.blocks.allocate(20)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=58) for i in range(2)))
    while rig.scheduler.num_preemptions == 0:
        turn(rig)
    rig.blocks.free(taken)
    turn(rig)
    return not isinstance(rig.batches[-1], PrefillBatch)


def prefilled_in_mid_stretch() -> bool:
    """Whether a sequence is left out of the step after its prefill, or out of its place there: its
    prompt is shorter than the running one is by now, and longer than that was at first."""
    rig = long_ones(1)
    for _ in range(10):
        turn(rig)
    rig.add(make_sequence(1, prompt_of(1, 8), max_tokens=9))
    while len(rig.batches) < 2 or not isinstance(rig.batches[-2], PrefillBatch):
        turn(rig)
    batch = rig.batches[-1]
    assert isinstance(batch, DecodeBatch)
    lengths = batch.context_lens.tolist()
    return len(lengths) < 2 or lengths != sorted(lengths, reverse=True) or is_noticed(rig)


def rows_in_vain() -> bool:
    """Whether a row is launched past its sequence's length."""
    rig = Rig(max_num_seqs=3)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=3 + i % 5) for i in range(12)))
    rig.run(lag=3)
    return rig.num_rows != rig.num_tokens


CASES = {
    "tokens are not written before a line is free": (
        ended_from_outside,
        (Scheduler, Scheduler.finish, "self._write_tokens()", "pass"),
    ),
    "tokens of other rows are put together": (
        preempted_in_mid_stretch,
        (Scheduler, Scheduler._keep, "self._tokens.rows is not batch.rows", "False"),
    ),
    "tokens are not written before it comes back": (
        kept_from_coming_back,
        (Scheduler, Scheduler._admit, "self._write_tokens()", "pass"),
    ),
    "steps are not written before a prefill": (
        prefilled_in_mid_stretch,
        (Scheduler, Scheduler._schedule_prefill, "self._write_steps()", "pass"),
    ),
    "last tokens in flight are forgotten at the next prefill": (
        rows_in_vain,
        (
            StepStretch,
            StepStretch.drop_ended,
            "self._table.num_launched[idx] += self._num_steps",
            "pass",
        ),
    ),
    "what was due for those that dropped out stands in the way": (
        preempted_beside_one_that_ended,
        (_Dates, _Dates.take, "<= step", "== step"),
    ),
    "a row stays past its last token": (
        rows_in_vain,
        (StepStretch, StepStretch.drop_ended, "self._ends.first > self._num_steps", "True"),
    ),
}


@pytest.mark.parametrize("is_wrong", list(dict.fromkeys(check for check, _ in CASES.values())))
def test_nothing_is_wrong(is_wrong: Callable[[], bool]) -> None:
    assert not is_wrong()


@pytest.mark.parametrize("name", CASES)
def test_it_is_noticed_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_wrong, (owner, function, old, new) = CASES[name]
    changed: Any = mutated(function, old, new)
    monkeypatch.setattr(owner, function.__name__, changed)
    assert is_wrong()


def test_rows_stay_the_same_where_one_ends_that_had_dropped_out() -> None:
    """Its last token was in flight. What a bank holds of the rows is then still right."""
    rig = Rig(max_num_seqs=3, max_model_len=64, num_blocks=64)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=6 + 20 * i) for i in range(2)))
    while not rig.finished:
        turn(rig)
        last = rig.batches[-1]
    turn(rig)
    assert rig.batches[-1].rows is last.rows
    assert len(last.rows) == 1
    rig.run()
    assert wrong(rig.finished) == []


def test_dates_that_have_passed_take_no_memory() -> None:
    rig = Rig(max_num_seqs=2, max_model_len=256, num_blocks=256, block_size=1)
    rig.add(*(make_sequence(i, prompt_of(i, 4), max_tokens=200) for i in range(2)))
    for _ in range(150):
        turn(rig)
    assert rig.scheduler._steps is not None
    assert len(rig.scheduler._steps._blocks_end._steps) <= 4


def stretch_of(stop_ids: list[tuple[int, ...]]) -> TokenStretch:
    table = SequenceTable(len(stop_ids), 64, 4)
    rows = [
        table.acquire(make_sequence(i, [1], max_tokens=20, stop_ids=ids), i)
        for i, ids in enumerate(stop_ids)
    ]
    return TokenStretch(table, np.array(rows))


def test_a_stop_id_is_that_of_its_own_row() -> None:
    stretch = stretch_of([(), (7, 9), (5,)])
    assert stretch.keep(np.array([7, 5, 9]))
    assert stretch.keep(np.array([0, 0, 0])), "nobody's"
    assert not stretch.keep(np.array([1, 1, 5]))
    assert not stretch.keep(np.array([1, 9, 1]))
