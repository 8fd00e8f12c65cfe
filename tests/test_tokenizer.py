"""Does text become the right tokens, and do stop strings end it where they should?

The tokenizers are built here: byte-level BPE as in Llama 3 and Qwen, with tokens that end within a
character, and one in the manner of Llama 2, where the first space of a text is dropped.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import REPLACEMENT, first_stop
from tiny import CHAT_TEMPLATE, byte_letters, byte_level_bpe, save_tokenizer, tricky_bpe
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from graphengine.config import MAX_STOP_IDS
from graphengine.errors import ModelError, RequestError
from graphengine.intake import Feeder, Intake
from graphengine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Sequence,
    check_text,
)
from graphengine.tokenizer import StopStrings, Tokenizer

ALPHABET = "abcd .\né€𝄞"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tricky")
    return Tokenizer(save_tokenizer(tricky_bpe(), path, chat_template=CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(
        save_tokenizer(metaspace_bpe(), tmp_path_factory.mktemp("metaspace"), chat_template=None)
    )


def metaspace_bpe() -> FastTokenizer:
    """As Llama 2: spaces are letters of tokens, and a text's first one is dropped."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *"abc▁é", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    return tokenizer


# --- text and tokens


@given(st.text(ALPHABET, max_size=20))
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_text_survives_the_way_there_and_back(text: str) -> None:
    tokenizer = tricky_bpe()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_prompt_gets_the_special_tokens_its_tokenizer_adds(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcd")
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abcd"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>abcd"


def test_chat_gets_those_of_its_template_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert ids == [1, *tokenizer.encode("ab")[1:]]
    assert tokenizer.eos_token_id == 2


def test_chat_without_a_template_is_refused(metaspace: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template; send a prompt"):
        metaspace.encode_chat([{"role": "user", "content": "ab"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('first\nsecond') }}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # the sandbox
        "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
        "{% broken",
    ],
)
def test_template_that_fails_refuses_the_request_in_one_line(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(save_tokenizer(tricky_bpe(), tmp_path, chat_template=template))
    with pytest.raises(RequestError, match="the chat template refuses the messages") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    """JSON can spell it; tokenizers raise TypeError, which would end the whole run."""
    with pytest.raises(RequestError, match=r"half of a surrogate pair \(\\ud800\)"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udc00"}])


@pytest.mark.parametrize(
    ("code", "byte"), [(0xDC7F, None), (0xDC80, "0x80"), (0xDCFF, "0xff"), (0xDD00, None)]
)
def test_half_that_may_be_a_byte_of_the_command_line_is_told_as_both(
    code: int, byte: str | None
) -> None:
    """Once as the byte alone, also in a file, where it is half of an emoji."""
    with pytest.raises(RequestError) as caught:
        check_text("prompt", f"a{chr(code)}")
    shown = f"prompt holds half of a surrogate pair (\\u{code:04x})"
    rest = "; take it out"
    if byte is not None:
        rest = (
            f", on a command line the byte {byte} that is not UTF-8; give whole characters, "
            "in UTF-8"
        )
    assert str(caught.value) == shown + rest


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"version": "1.0"}', "[]"])
def test_directory_without_a_usable_tokenizer_is_refused_in_one_line(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    expected = (
        r"no usable tokenizer in '.*' \([A-Za-z]+(Error|Exception): .*"
        r"`run` and LLM need none for token ids \(skip_tokenizer_init\)"  # `generate` has it not
    )
    with pytest.raises(ModelError, match=expected) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_a_checkpoint_brings_is_never_run(tmp_path: Path) -> None:
    save_tokenizer(tricky_bpe(), tmp_path, chat_template=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    config["tokenizer_class"] = "EvilTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    with contextlib.suppress(ModelError):
        Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- stop strings


def push_all(
    tokenizer: Tokenizer,
    token_ids: list[int],
    stop: tuple[str, ...],
    *,
    min_tokens: int = 0,
    skip_special_tokens: bool = True,
) -> tuple[int, str, str] | None:
    """(tokens it took, stop string, text before it)."""
    stops = StopStrings(
        tokenizer, stop, min_tokens=min_tokens, skip_special_tokens=skip_special_tokens
    )
    for count, token_id in enumerate(token_ids, start=1):
        found = stops.push(token_id)
        if found is not None:
            return count, *found
    return None


def search_all(
    tokenizer: Tokenizer,
    token_ids: list[int],
    stop: tuple[str, ...],
    *,
    min_tokens: int = 0,
    skip_special_tokens: bool = True,
) -> tuple[int, str, str] | None:
    """The same from the whole text after each token."""
    closed = 0
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:count], skip_special_tokens=skip_special_tokens)
        text = text.rstrip(REPLACEMENT)
        if count <= min_tokens:
            closed = len(text)
            continue
        found = first_stop(text, stop, after=closed)
        if found is not None:
            at, string = found
            return count, string, text[:at]
    return None


STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.integers(0, 31), max_size=25), STOPS, st.integers(0, 4), st.booleans())
@settings(
    max_examples=400,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_stop_strings_are_found_as_in_the_whole_text(
    tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...], min_tokens: int, skip: bool
) -> None:
    """Any bytes in any order: characters cut anywhere, special tokens, ids that no token has."""
    found = push_all(tokenizer, token_ids, stop, min_tokens=min_tokens, skip_special_tokens=skip)
    assert found == search_all(
        tokenizer, token_ids, stop, min_tokens=min_tokens, skip_special_tokens=skip
    )


@given(st.text(ALPHABET, max_size=25), STOPS, st.integers(0, 3))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_text_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], min_tokens: int
) -> None:
    token_ids = tokenizer.encode(text)[1:]
    found = push_all(tokenizer, token_ids, stop)
    first = min((text.find(string) for string in stop if string in text), default=None)
    if first is None:
        assert found is None
    else:
        assert found is not None
        count, string, before = found
        assert string in stop
        assert text.startswith(before + string)
        # A stop string that began earlier may have been complete later only.
        assert not any(string in before for string in stop)
        assert push_all(tokenizer, token_ids[: count - 1], stop) is None


@given(
    st.lists(st.integers(4, 11), max_size=20),
    st.lists(st.text("ab cé", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple),
)
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
def test_first_space_of_a_text_does_not_confuse_the_window(
    metaspace: Tokenizer, token_ids: list[int], stop: tuple[str, ...]
) -> None:
    """Llama 2 decodes a token with a leading space in two ways, by whether it comes first."""
    assert push_all(metaspace, token_ids, stop) == search_all(metaspace, token_ids, stop)


def ids_of(*pieces: bytes) -> list[int]:
    """Token ids of pieces that are tokens of the tricky tokenizer."""
    vocab, letters = tricky_bpe().get_vocab(), byte_letters()
    return [vocab["".join(letters[byte] for byte in piece)] for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        pytest.param([b"a", b"b"], "ab", (2, "ab", ""), id="across tokens"),
        pytest.param([b"c", b"abcd"], "bc", (2, "bc", "ca"), id="inside a token"),
        pytest.param([b"\xc3", b"\xa9"], "é", (2, "é", ""), id="across the bytes of a character"),
        pytest.param(
            [b"\xf0", b"\x9d\x84", b"\x9e", b"a"], "𝄞a", (4, "𝄞a", ""), id="four bytes in three"
        ),
        pytest.param([b"b\xc3"], "b", (1, "b", ""), id="beside an unfinished character"),
        pytest.param([b"a", b" \xe2"], " ", (2, " ", "a"), id="space and the start of a dash"),
        pytest.param([b"\xc3", b"\xa9a"], "a", (2, "a", "é"), id="behind the end of a character"),
        pytest.param([b"\xe2", b"a"], "a", (2, "a", "\ufffd"), id="behind a broken character"),
        pytest.param([b"\xe2", b"\xc3"], "\ufffd", None, id="U+FFFD may still be a character"),
        pytest.param([b"a", b"b"], "ba", None, id="not there"),
    ],
)
def test_stop_string_is_found_with_the_token_that_completes_it(
    tokenizer: Tokenizer,
    pieces: list[bytes],
    stop: str,
    expected: tuple[int, str, str] | None,
) -> None:
    assert push_all(tokenizer, ids_of(*pieces), (stop,)) == expected


def test_min_tokens_closes_their_text_to_stop_strings(tokenizer: Tokenizer) -> None:
    token_ids = ids_of(b"a", b"b", b"a", b"b", b"a", b"b")
    assert push_all(tokenizer, token_ids, ("ab",)) == (2, "ab", "")
    # The first "ab" ends within the first two tokens.
    assert push_all(tokenizer, token_ids, ("ab",), min_tokens=2) == (4, "ab", "ab")
    assert push_all(tokenizer, token_ids, ("ab",), min_tokens=3) == (4, "ab", "ab")
    assert push_all(tokenizer, token_ids, ("ba",), min_tokens=2) == (3, "ba", "a")
    assert push_all(tokenizer, token_ids, ("ab",), min_tokens=6) is None


def test_only_a_window_is_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a token must not grow with the text before it."""
    lengths = []
    original = Tokenizer.decode

    def decode(self: Tokenizer, token_ids: Any, *, skip_special_tokens: bool) -> str:
        lengths.append(len(token_ids))
        return original(self, token_ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    assert push_all(tokenizer, ids_of(*[b"a", b"b", b"\xc3", b"\xa9"] * 100), ("x",)) is None
    assert max(lengths) <= 4


# --- intake

VOCAB_SIZE = 40
MAX_MODEL_LEN = 12


def make_intake(tokenizer: Tokenizer | None, *, seed: int = 0) -> Intake:
    return Intake(
        tokenizer,
        eos_token_ids=(2, 9),
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        seed=seed,
    )


def take_in(intake: Intake, *prompts: Any, **params: Any) -> list[Sequence | RequestOutput]:
    return list(intake.sequences(prompts, SamplingParams(**params)))


REFUSED = [
    pytest.param("", "empty", id="empty"),
    pytest.param({"prompt": ""}, "empty", id="empty in a mapping"),
    pytest.param({"prompt_token_ids": []}, "empty", id="no ids"),
    pytest.param({"prompt_token_ids": [1, -1]}, "holds -1; the vocabulary is 0..39", id="negative"),
    pytest.param({"prompt_token_ids": [40]}, "holds 40; the vocabulary is 0..39", id="too high"),
    pytest.param({"prompt_token_ids": [2**80]}, "the vocabulary is 0..39", id="far too high"),
    pytest.param({"prompt_token_ids": [True]}, "holds True; give a list of int", id="a bool"),
    pytest.param({"prompt_token_ids": [3, False, 4]}, "holds False; give a list", id="one bool"),
    pytest.param({"prompt_token_ids": [1.0]}, "holds 1.0; give a list of int", id="a float"),
    pytest.param({"prompt_token_ids": [[1]]}, "give a list of int", id="nested"),
    pytest.param({"prompt_token_ids": "12"}, "give a list of int", id="ids in a string"),
    pytest.param({"prompt_token_ids": None}, "give a list of int", id="no list"),
    pytest.param({"prompt": 5}, "prompt is 5; give a string", id="a number"),
    pytest.param({"messages": "hello"}, "give a list of objects", id="messages in a string"),
    pytest.param({"messages": ["hello"]}, "give a list of objects", id="message without role"),
    pytest.param({"messages": []}, "chat template refuses", id="no messages"),
    pytest.param(
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "holds {'type': 'image_url'}; give text parts alone",
        id="an image",
    ),
    pytest.param({"prompt": "a", "messages": []}, "one of prompt, messages", id="two kinds"),
    pytest.param({"text": "a"}, "one of prompt, messages", id="unknown key"),
    pytest.param({}, "one of prompt, messages", id="no key"),
    pytest.param(None, "one of prompt, messages", id="nothing"),
    pytest.param(7, "one of prompt, messages", id="no prompt"),
    pytest.param([1, 2], "one of prompt, messages", id="a bare list"),
    pytest.param("ab\ud800", "surrogate", id="half a surrogate pair"),
    pytest.param({"prompt_token_ids": [5] * 12}, "has 12 tokens, max_model_len is 12", id="long"),
    pytest.param("a" * 5000, "max_model_len is 12", id="very long"),
    pytest.param({"x" * 500: 1}, "...", id="long key"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED)
def test_bad_prompt_is_refused_in_one_line_and_the_others_go_on(
    tokenizer: Tokenizer, prompt: Any, message: str
) -> None:
    before, refused, after = take_in(make_intake(tokenizer), "ab", prompt, "cd")
    assert isinstance(before, Sequence)
    assert isinstance(after, Sequence)
    assert (before.index, after.index) == (0, 2)
    assert isinstance(refused, RequestOutput)
    assert message in refused.error
    assert "\n" not in refused.error
    assert len(refused.error) < 250
    assert (refused.index, refused.request_id, refused.finished) == (1, "1", True)
    (completion,) = refused.outputs
    assert completion.finish_reason is FinishReason.ERROR
    assert (completion.text, completion.token_ids) == ("", [])


@pytest.mark.parametrize("pack", [list, tuple])
def test_text_parts_of_a_chat_are_joined(tokenizer: Tokenizer, pack: Callable[..., Any]) -> None:
    """Once the template was given the list, and wrote it as Python would."""
    parts = pack({"type": "text", "text": text} for text in ("a", "b"))
    chats = [{"messages": [{"role": "user", "content": content}]} for content in ("ab", parts)]
    given = copy.deepcopy(chats)
    plain, joined = take_in(make_intake(tokenizer), *chats)
    assert chats == given, "they are the caller's"
    assert isinstance(plain, Sequence)
    assert isinstance(joined, Sequence)
    assert joined.prompt_token_ids == plain.prompt_token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [40]}, "stop_token_ids holds 40; the vocabulary is 0..39"),
        ({"stop_token_ids": [-3]}, "stop_token_ids holds -3"),
        ({"stop_token_ids": list(range(3, 3 + MAX_STOP_IDS))}, "give at most 32"),
    ],
)
def test_bad_stop_ids_refuse_the_request(
    tokenizer: Tokenizer, params: dict[str, Any], message: str
) -> None:
    (refused,) = take_in(make_intake(tokenizer), "ab", **params)
    assert isinstance(refused, RequestOutput)
    assert message in refused.error


@pytest.mark.parametrize(
    "prompt", ["ab", {"prompt": "ab"}, {"messages": [{"role": "user", "content": "ab"}]}]
)
def test_text_needs_a_tokenizer(prompt: Any) -> None:
    refused, accepted = take_in(make_intake(None), prompt, {"prompt_token_ids": [3]})
    assert isinstance(refused, RequestOutput)
    assert "needs a tokenizer; send prompt_token_ids" in refused.error
    assert isinstance(accepted, Sequence)


def test_stop_string_needs_a_tokenizer() -> None:
    (refused,) = take_in(make_intake(None), {"prompt_token_ids": [3]}, stop=["a"])
    assert isinstance(refused, RequestOutput)
    assert "stop strings need a tokenizer" in refused.error


def test_request_of_its_own_id_and_params_keeps_them(tokenizer: Tokenizer) -> None:
    own = Request("ab", SamplingParams(max_tokens=3, seed=77), "mine")
    mine, default = take_in(make_intake(tokenizer), own, "cd", max_tokens=5)
    assert isinstance(mine, Sequence)
    assert isinstance(default, Sequence)
    assert (mine.request_id, mine.seed) == ("mine", 77)
    assert mine.max_total == len(tokenizer.encode("ab")) + 3
    assert (default.request_id, default.params.max_tokens) == ("1", 5)
    assert (mine.prompt, default.prompt) == ("ab", "cd")


def test_longest_prompt_leaves_room_for_one_token() -> None:
    (sequence,) = take_in(make_intake(None), {"prompt_token_ids": [3] * 11}, max_tokens=None)
    assert isinstance(sequence, Sequence)
    assert sequence.max_total == 12


def test_eos_is_a_stop_id_unless_ignored() -> None:
    ids = {"prompt_token_ids": [3]}
    for params, expected in (
        ({}, {2, 9}),
        ({"ignore_eos": True}, set()),
        ({"stop_token_ids": [9, 5, 5]}, {2, 9, 5}),
        ({"ignore_eos": True, "stop_token_ids": [9]}, {9}),
    ):
        (sequence,) = take_in(make_intake(None), ids, **params)
        assert isinstance(sequence, Sequence)
        assert set(sequence.stop_ids) == expected
        assert len(sequence.stop_ids) == len(expected)


def test_seeds_of_requests_that_bring_none() -> None:
    """The same for the same place and engine seed, and different everywhere else."""

    def seeds(seed: int) -> list[int]:
        sequences = take_in(make_intake(None, seed=seed), *[{"prompt_token_ids": [3]}] * 200)
        return [sequence.seed for sequence in sequences if isinstance(sequence, Sequence)]

    assert seeds(1) == seeds(1)
    assert all(0 <= seed < 2**63 for seed in seeds(2**63 - 1))
    assert len({*seeds(0), *seeds(1), *seeds(2)}) == 600


# --- the feeder


def test_feeder_reads_no_further_than_its_depth() -> None:
    num_read = 0

    def items() -> Iterator[Any]:
        nonlocal num_read
        while True:
            num_read += 1
            yield num_read

    feeder = Feeder(items(), depth=3)
    assert feeder.get(None) == 1
    for expected in range(2, 20):
        assert feeder.get(1.0) == expected
        assert num_read <= expected + 3 + 1  # the queue, and one in hand
    feeder.close()
    assert not feeder._thread.is_alive()


def test_feeder_hands_over_the_exception_after_what_came_before() -> None:
    def items() -> Iterator[Any]:
        yield "first"
        raise OSError("disk gone")

    feeder = Feeder(items(), depth=3)
    assert feeder.get(None) == "first"
    with pytest.raises(OSError, match="disk gone"):
        feeder.get(None)
    assert feeder.exhausted
    assert feeder.get(None) is None
    feeder.close()


def test_feeder_tells_nothing_yet_from_the_end() -> None:
    gate = threading.Event()

    def items() -> Iterator[Any]:
        gate.wait(5)
        yield "late"

    feeder = Feeder(items(), depth=3)
    assert feeder.get() is None
    assert feeder.get(0.01) is None
    assert not feeder.exhausted
    gate.set()
    assert feeder.get(None) == "late"
    assert feeder.get(None) is None
    assert feeder.exhausted
    feeder.close()


def test_feeder_closes_while_the_queue_is_full() -> None:
    feeder = Feeder(iter(range(100)), depth=1)  # type: ignore[arg-type]
    feeder.close()
    assert not feeder._thread.is_alive()


def test_merged_tokens_are_what_they_seem() -> None:
    """The tricky tokenizer itself: otherwise the tests above could pass for nothing."""
    tokenizer = byte_level_bpe("ab", [(b"a", b"b")])
    assert tokenizer.encode("abab", add_special_tokens=False).ids == [6, 6]
    tricky = tricky_bpe()
    assert tricky.decode(ids_of(b" \xe2")) == " \ufffd"
    assert tricky.decode(ids_of(b" \xe2", b"\x82\xac")) == " €"
