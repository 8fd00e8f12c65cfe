"""Would the oracle notice? Each rule of the decode step is broken once; the tokens must go wrong.

A rule that no test can miss could be dropped by the next change without anybody seeing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from accounting import check_blocks
from late_streams import LateStreams
from mutation import mutated
from tiny import World, make_world, request

import graphengine.build
import graphengine.model_runner
import graphengine.step_inputs
from captures import Banks, StepPipeline
from graphengine import Request
from graphengine.scheduler import Scheduler
from graphengine.sequence_table import SequenceTable
from graphengine.step_inputs import (
    Filled,
    _fill_places,
    _fill_suppressed,
    decode_fields,
    fill_decode,
    fill_prefill,
)
from graphengine.stretches import StepStretch, TokenStretch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


def fixed_requests(world: World, *, has_stop_strings: bool) -> list[Request]:
    """Stops of every kind at many places, so that lines change owners under steps in flight."""
    return [
        request(
            [(7 * index + 3 * place) % world.vocab_size for place in range(1 + index % 9)],
            temperature=(0.0, 0.0, 2.0)[index % 3],
            seed=index,
            max_tokens=3 + 5 * index % 17,
            min_tokens=index % 4,
            stop_token_ids=[index % 30, 3, 12, 14, 23, 26],
            stop=["ab", "d"] if has_stop_strings and index % 4 == 0 else [],
        )
        for index in range(24)
    ]


def run(world: World) -> list[str]:
    """What goes wrong, request by request. Buckets of 1, 2, 4 and 7 rows, and few blocks. Without
    stop strings too: tokens are then kept for a while before they are looked at."""
    wrong: list[str] = []
    with world.llm(max_num_seqs=7, num_gpu_blocks_override=13, max_num_batched_tokens=12) as llm:
        for has_stop_strings in (True, False):
            requests = fixed_requests(world, has_stop_strings=has_stop_strings)
            outputs = list(llm.stream(requests))
            assert llm.stats().num_preemptions > 0
            wrong += world.wrong(requests, outputs)
    return wrong


def use_late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphengine.build, "make_streams", lambda device: LateStreams())


@dataclass(frozen=True)
class Mutation:
    """Replaces `old` by `new` in the function that `owner` knows as `name`."""

    owner: Any
    function: Callable[..., Any]
    old: str
    new: str
    copies_are_late: bool = False

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.copies_are_late:
            use_late_copies(monkeypatch)
        changed = mutated(self.function, self.old, self.new)
        monkeypatch.setattr(self.owner, self.function.__name__, changed)


RUNNER = graphengine.model_runner
MUTATIONS = {
    "a late result is taken for the line's next owner": Mutation(
        Scheduler,
        Scheduler.commit,
        "live = table.epochs[batch.rows] == batch.epochs",
        "live = np.ones(len(batch.rows), np.bool_)",
    ),
    "padded rows feed back to line 0": Mutation(
        RUNNER, decode_fields, "pad=table.null_idx", "pad=0"
    ),
    "padded rows write to block 1": Mutation(
        RUNNER,
        decode_fields,
        'Field("slot_mapping", torch.int64, pad=NULL_BLOCK)',
        'Field("slot_mapping", torch.int64, pad=table.block_size)',
    ),
    "a bank keeps rows of its last fill": Mutation(
        StepPipeline, StepPipeline.open, "inputs[field.name][num_rows:] = field.pad", "pass"
    ),
    "a bank keeps block tables of its last fill": Mutation(
        graphengine.step_inputs,
        _fill_places,
        'np.take(table.block_tables, rows, axis=0, out=views["block_tables"][:n], mode="clip")',
        "pass",
    ),
    "a bank's places go on past their blocks": Mutation(
        Filled, Filled.num_steps_to, "<= self.num_steps_left", "<= self.num_steps_left + 1"
    ),
    "a bank's rows go on as if they had stood still": Mutation(
        RUNNER, fill_decode, "np.add(slots, num_steps, out=slots)", "pass"
    ),
    "a bank's places are not counted from its last fill": Mutation(
        Filled, Filled.num_steps_to, "- self.first_len", "- self.first_len - 1"
    ),
    "a bank keeps what its last rows had": Mutation(
        Filled, Filled.has_rows_of, "self.rows is batch.rows", "len(self.rows) == len(batch.rows)"
    ),
    "a late result is not looked at": Mutation(
        Scheduler, Scheduler.commit, "batch.num_released != table.num_released", "False"
    ),
    "the step does not wait for its copy-in": Mutation(
        Banks,
        Banks.launch,
        "streams.wait(COMPUTE, bank.copied)",
        "pass",
        copies_are_late=True,
    ),
    "the host does not wait for the step": Mutation(
        Banks, Banks.wait, "bank.ready.synchronize()", "pass", copies_are_late=True
    ),
    "a preempted sequence keeps its place": Mutation(
        Scheduler, Scheduler._preempt, "table.num_computed[idx] = 0", "pass"
    ),
    "a row stays though its sequence has ended": Mutation(
        Scheduler, Scheduler._leave, "self._steps.drop(lines)", "pass"
    ),
    "rows of those that have dropped out stay in a step": Mutation(
        StepStretch, StepStretch.drop, "self._computed = self._computed[is_left]", "pass"
    ),
    "tokens are not written before others": Mutation(
        Scheduler, Scheduler.commit, "self._write_tokens()", "pass"
    ),
    "steps are not written before one is preempted": Mutation(
        Scheduler, Scheduler._schedule_decode, "self._write_steps()", "pass"
    ),
    "a block is given a step late": Mutation(
        StepStretch,
        StepStretch.take_full,
        "take(self._num_steps)",
        "take(self._num_steps - 1)",
    ),
    "a sequence goes on past its stop token": Mutation(
        TokenStretch, TokenStretch.keep, "(self._stop_ids == token_ids).any()", "False"
    ),
    "a sequence goes on past its length": Mutation(
        TokenStretch, TokenStretch.keep, ">= self._most_steps", "> self._most_steps"
    ),
    "steps are counted as launched alone": Mutation(
        StepStretch,
        StepStretch.write,
        "self._table.num_computed[self.rows] += self._num_steps",
        "pass",
    ),
    "a chunk in mid-prompt counts as a token": Mutation(
        Scheduler, Scheduler.commit, "live &= batch.samples", "pass"
    ),
    "positions do not count earlier chunks": Mutation(
        RUNNER, fill_prefill, "batch.starts - (ends - lengths)", "-(ends - lengths)"
    ),
    "min_tokens is one token off": Mutation(
        graphengine.step_inputs,
        _fill_suppressed,
        "num_before < table.min_total[rows]",
        "num_before + 1 < table.min_total[rows]",
    ),
    "the noise is that of the next position": Mutation(
        RUNNER,
        fill_prefill,
        'sequences["last_positions"][:n] = batch.ends - 1',
        'sequences["last_positions"][:n] = batch.ends',
    ),
}


@pytest.mark.parametrize("copies_are_late", [False, True])
def test_nothing_goes_wrong_without_a_mutation(
    world: World, monkeypatch: pytest.MonkeyPatch, copies_are_late: bool
) -> None:
    if copies_are_late:
        use_late_copies(monkeypatch)
    assert run(world) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_oracle_notices(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    MUTATIONS[name].apply(monkeypatch)
    try:
        wrong = run(world)
    except Exception:  # a broken step may also end in an index that is out of range
        return
    assert wrong != []


def test_scan_notices_a_stale_column(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """nano-vllm #190. Attention reads no further than a sequence is long, so tokens alone do not
    show it."""
    take_blocks = mutated(
        SequenceTable.take_blocks, "self.block_tables[idx, :held] = NULL_BLOCK", "pass"
    )
    monkeypatch.setattr(SequenceTable, "take_blocks", take_blocks)
    with world.llm(max_num_seqs=2) as llm:
        llm.generate({"prompt_token_ids": [3, 4, 5]})
        with pytest.raises(AssertionError, match="stale column"):
            check_blocks(llm._table, llm._blocks)
