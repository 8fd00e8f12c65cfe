"""Which small worlds do the engine tests share? A random checkpoint, tokenizers, and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint
from oracle import Answer, Oracle
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graphengine import LLM, Request, RequestOutput, SamplingParams

# Every prompt and output of the tiny worlds fits in it; no block size below divides it evenly.
MAX_MODEL_LEN = 29
SPECIAL = ("<pad>", "<s>", "</s>", "<tool>")
EOS_TOKEN_IDS = (2, 9)
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def byte_letters() -> dict[int, str]:
    """GPT-2's visible letter for each byte."""
    letters = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in letters]
    return {byte: chr(byte) for byte in letters} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def byte_level_bpe(text: str, merges: Sequence[tuple[bytes, bytes]]) -> FastTokenizer:
    """Special tokens, a token for each byte of `text`, and one for each merge of two."""
    letters = byte_letters()
    pairs = [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in merges]
    pieces = [letters[byte] for byte in dict.fromkeys(text.encode())]
    pieces += [left + right for left, right in pairs]
    vocab = {piece: place for place, piece in enumerate((*SPECIAL, *pieces))}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def tricky_bpe() -> FastTokenizer:
    """Characters of one to four bytes, and tokens that end or begin within one."""
    merges = [
        (b"a", b"b"),
        (b"c", b"d"),
        (b" ", b"a"),
        (b" ", b"\xe2"),  # as GPT-2's own " \xe2": a space and the start of a dash or a quote
        (b"b", b"\xc3"),
        (b"\xa9", b"a"),
        (b"\x82", b"\xac"),
        (b"\x9d", b"\x84"),
        (b"ab", b"cd"),
    ]
    return byte_level_bpe("abcd .\né€𝄞", merges)


def save_tokenizer(tokenizer: FastTokenizer, path: Path, *, chat_template: str | None) -> Path:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(path)
    return path


@dataclass
class World:
    """A checkpoint with its tokenizer, and the oracle on the same files."""

    path: Path
    oracle: Oracle
    vocab_size: int

    def llm(self, **options: Any) -> LLM:
        """On the CPU unless told otherwise, whatever this machine has."""
        defaults = {"device": "cpu", "max_model_len": MAX_MODEL_LEN, "block_size": 4}
        return LLM(str(self.path), **{**defaults, **options})

    def wrong(self, requests: Sequence[Request], outputs: Sequence[RequestOutput]) -> list[str]:
        """One line for each request whose output is not what the oracle says."""
        by_index = {output.index: output for output in outputs}
        assert sorted(by_index) == list(range(len(requests))), "each request ends exactly once"
        lines = []
        for index, request in enumerate(requests):
            assert request.sampling_params is not None
            expected = self.oracle.answer(token_ids_of(request), request.sampling_params)
            actual = Answer.of(by_index[index])
            if actual != expected:
                lines.append(f"{request}\n    gave {actual}\n    owes {expected}")
        return lines


def token_ids_of(request: Request) -> list[int]:
    assert not isinstance(request.prompt, str)
    token_ids = request.prompt["prompt_token_ids"]
    assert isinstance(token_ids, list)
    return token_ids


def make_world(path: Path) -> World:
    tokenizer = tricky_bpe()
    # A few ids that no token has, as in checkpoints whose vocabulary was rounded up.
    vocab_size = tokenizer.get_vocab_size() + 3
    write_checkpoint(
        path,
        "llama_gqa_llama3",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        eos_token_id=list(EOS_TOKEN_IDS),
        bos_token_id=1,
    )
    save_tokenizer(tokenizer, path, chat_template=CHAT_TEMPLATE)
    oracle = Oracle(
        path,
        eos_token_ids=EOS_TOKEN_IDS,
        max_model_len=MAX_MODEL_LEN,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(path),
    )
    return World(path, oracle, vocab_size)


def request(token_ids: Sequence[int], **params: Any) -> Request:
    return Request({"prompt_token_ids": list(token_ids)}, SamplingParams(**params))
