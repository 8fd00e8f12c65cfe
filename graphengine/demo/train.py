"""How is the demo model made, and how often is it right?

Trains a small Llama on `a+b=` -> sum, EOS, and writes it as a transformers checkpoint:

    python -m graphengine.demo.train --output DIR      # train, then evaluate
    python -m graphengine.demo.train --evaluate DIR    # one JSON line on the held-out pairs

Shapes in this module: B sums, T positions of a sum's row (BOS, prompt, answer, EOS, padding).
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphengine.demo.sums import MAX_OPERAND, answer, heldout_pairs, prompt

PAD, BOS, EOS, UNK = range(4)
DIGIT_0, PLUS, EQUALS = 4, 14, 15
VOCAB = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", "+", "="]
MAX_ANSWER_TOKENS = 5  # four digits and EOS
IGNORED = -100  # cross_entropy's default ignore_index
BLANK = -1
# The last user message alone: the model knows one sum at a time.
CHAT_TEMPLATE = (
    "{{ bos_token }}{{ (messages | selectattr('role', 'equalto', 'user') | list | last)"
    "['content'] | trim }}"
)


@dataclass(frozen=True)
class TrainConfig:
    """`num_steps` batches of `batch_size` sums; both learning rates warm up, then fall to 0."""

    output: Path
    device: str
    seed: int
    num_steps: int
    batch_size: int
    num_layers: int
    hidden_size: int
    muon_lr: float
    adam_lr: float


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; BOS goes in front, white space is dropped."""
    backend = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=[], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(Regex(r"\s"), "")
    backend.decoder = decoders.Fuse()  # the default puts a space between tokens
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(config: TrainConfig) -> LlamaForCausalLM:
    """A Llama with random weights, head dim 32 and half as many KV heads as heads."""
    num_heads = config.hidden_size // 32
    model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads // 2,
            head_dim=32,
            max_position_embeddings=64,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    )
    model.generation_config.do_sample = False
    return model


def sample_pairs(num_pairs: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Operands a, b: int64 [num_pairs], with more short ones and more runs of carries than
    uniform draws would give, as those are what a model gets wrong last."""
    device = generator.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (num_pairs,), generator=generator, device=device)

    def operand() -> Tensor:
        num_digits = (draw(8) + 1).clamp(max=3)  # 1 and 2 digits: one in eight each
        return draw(MAX_OPERAND + 1) % 10**num_digits

    a, b = operand(), operand()
    has_runs = draw(4) == 0
    nines = torch.zeros_like(a)
    for place in (1, 10, 100):  # a digit pair adding up to 9 passes a carry on
        is_nine = has_runs & (draw(2) == 0)
        nines += is_nine * (9 - a // place % 10 - b // place % 10) * place
    return a, b + nines


def encode_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels: int64 [B, T-1]; only the answer and its EOS carry labels."""
    columns: list[Tensor] = [torch.full_like(a, BOS)]
    for value, width, closer in ((a, 3, PLUS), (b, 3, EQUALS), (a + b, 4, EOS)):
        for place in (10**i for i in reversed(range(width))):
            is_written = (value >= place) | (place == 1)
            columns.append(torch.where(is_written, value // place % 10 + DIGIT_0, BLANK))
        columns.append(torch.full_like(a, closer))
    padded = torch.stack(columns, dim=1)  # [B, T], blanks where a number is short
    is_answer = torch.zeros_like(padded, dtype=torch.bool)
    is_answer[:, -MAX_ANSWER_TOKENS:] = padded[:, -MAX_ANSWER_TOKENS:] != BLANK
    order = (padded == BLANK).long().argsort(dim=1, stable=True)  # blanks to the right
    tokens = padded.gather(1, order)
    tokens = tokens.masked_fill(tokens == BLANK, PAD)
    labels = tokens.masked_fill(~is_answer.gather(1, order), IGNORED)
    return tokens[:, :-1], labels[:, 1:]


def train(config: TrainConfig) -> LlamaForCausalLM:
    """The trained model: float32, its weights an exponential average over the last steps."""
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    generator = torch.Generator(device).manual_seed(config.seed)
    with device:
        model = build_model(config)
    # On CPU, scaled_dot_product_attention's bfloat16 backward takes most of a step.
    model.set_attn_implementation("eager")
    is_heldout = torch.zeros(MAX_OPERAND + 1, MAX_OPERAND + 1, dtype=torch.bool)
    is_heldout[tuple(torch.tensor(heldout_pairs()).unbind(1))] = True
    is_heldout = is_heldout.to(device)

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    num_warmup = min(100, config.num_steps // 10 + 1)

    def lr_scale(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
        return min((step + 1) / num_warmup, decay)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lr_scale) for o in optimizers]
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    start_s = time.monotonic()
    for step in range(config.num_steps):
        a, b = sample_pairs(config.batch_size, generator=generator)
        is_seen = ~is_heldout[a, b]
        inputs, labels = encode_sums(a[is_seen], b[is_seen])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        # A short memory at first, so that the average does not carry the random start.
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(0.005, 1 / (step + 1)))
        if step % 100 == 0 or step == config.num_steps - 1:
            elapsed_s = time.monotonic() - start_s
            print(f"step {step} loss {loss.item():.6f} elapsed {elapsed_s:.0f} s", flush=True)
    with torch.no_grad():
        for parameter, averaged in zip(parameters, average, strict=True):
            parameter.copy_(averaged)
    return model


@torch.no_grad()
def evaluate(checkpoint: Path, *, dtype: torch.dtype, device: str) -> dict[str, object]:
    """Greedy decoding of every held-out pair, with weights and compute in `dtype`.

    The margins are the distances from the right token's logit to the best other one, over all
    answer tokens (EOS included), each given the right tokens before it.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    loaded = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = loaded.to(torch.device(device))  # type: ignore[arg-type]  # its wrapper drops self
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair in heldout_pairs():
        by_length[len(prompt(*pair))].append(pair)  # equal lengths, hence no padding
    wrong: list[str] = []
    margins: list[Tensor] = []
    for pairs in by_length.values():
        for chunk in (pairs[i : i + 1024] for i in range(0, len(pairs), 1024)):
            batch = tokenizer([prompt(*pair) for pair in chunk], return_tensors="pt").to(device)
            output = model.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
            for pair, row in zip(chunk, output.tolist(), strict=True):
                text = str(tokenizer.decode(row)).replace("<pad>", "")
                if text != f"<s>{prompt(*pair)}{answer(*pair)}</s>":
                    wrong.append(text)
            inputs, labels = encode_sums(*torch.tensor(chunk, device=device).unbind(1))
            logits = model(input_ids=inputs).logits[labels != IGNORED].float()
            right = labels[labels != IGNORED].unsqueeze(1)
            best_other = logits.scatter(1, right, -torch.inf).amax(1)
            margins.append(logits.gather(1, right).squeeze(1) - best_other)
    num_pairs = sum(map(len, by_length.values()))
    margin = torch.cat(margins).cpu().numpy()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "num_pairs": num_pairs,
        "num_wrong": len(wrong),
        "exact_match": round(1 - len(wrong) / num_pairs, 6),
        "wrong": wrong[:10],
        "logit_margin": {
            f"p{q}": round(float(np.percentile(margin, q)), 3) for q in (0, 0.01, 0.1, 1, 10, 50)
        },
    }


def save(model: LlamaForCausalLM, output: Path) -> None:
    """Write the checkpoint with its weights rounded to bfloat16, which halves its size."""
    model.bfloat16().save_pretrained(output)
    build_tokenizer().save_pretrained(output)


def main() -> None:
    """The command line: `--output` trains and evaluates, `--evaluate` only evaluates."""
    parser = argparse.ArgumentParser(description="Train or evaluate the demo model.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--output", type=Path, help="train, and write the checkpoint here")
    mode.add_argument("--evaluate", type=Path, help="evaluate the checkpoint in this folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    args = parser.parse_args()
    if args.output is not None:
        config = TrainConfig(
            output=args.output,
            device=args.device,
            seed=args.seed,
            num_steps=args.steps,
            batch_size=args.batch_size,
            num_layers=args.layers,
            hidden_size=args.hidden_size,
            muon_lr=args.muon_lr,
            adam_lr=args.adam_lr,
        )
        save(train(config), config.output)
    dtype: torch.dtype = getattr(torch, args.dtype)
    print(json.dumps(evaluate(args.output or args.evaluate, dtype=dtype, device=args.device)))


if __name__ == "__main__":
    main()
