"""Can a model like demo/tiny-moe be made from any text files? Trains a small mixture of experts from scratch.

    python benchmarks/train_tiny_moe.py --text a.txt b.txt --out DIR               # the demo: 1-2 hours on 2 cores
    python benchmarks/train_tiny_moe.py --text a.txt b.txt --out DIR --steps 100   # minutes: a first impression

Each text is one domain, named after its file. Its last part is held out of everything (tokenizer included). Out comes a
folder that stock transformers loads (Qwen3-MoE in bf16, byte-level BPE), with `calibration/` (a slice of the training
text), `held_out/`, and `perplexity.json`: perplexity on the held-out part of each text, of the folder as it was saved.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END = "<|endoftext|>"
HELD_OUT_SHARE = 0.05
SLICE_CHARACTERS = 60_000  # of calibration/ and held_out/, as in demo/tiny-moe
HEAD_WIDTH = 64


def arguments() -> argparse.Namespace:
    """The command line; its defaults are the shape of demo/tiny-moe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="UTF-8 text files, one a domain")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {2 * HEAD_WIDTH}")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4, help="experts for each token")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.width % (2 * HEAD_WIDTH):
        parser.error(f"--width {options.width}: give a multiple of {2 * HEAD_WIDTH} (heads are {HEAD_WIDTH} wide)")
    if options.top_k > options.experts:
        parser.error(f"--top-k {options.top_k} is more than --experts {options.experts}")
    if options.vocab < 257:
        parser.error(f"--vocab {options.vocab}: give at least 257 (256 bytes and {END})")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty")
    if len({path.stem for path in options.text}) < len(options.text):
        parser.error("--text: two files have the same name, and the name is the name of the domain")
    return options


def split_texts(paths: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out part of every text: the tail is held out, cut between words."""
    training, held_out = {}, {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        if space := re.search(r"\s", text[cut:]):
            cut += space.end()
        training[path.stem], held_out[path.stem] = text[:cut], text[cut:]
    return training, held_out


def train_tokenizer(texts: dict[str, str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can write any text; token 0 ends a text and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    lines = (line for text in texts.values() for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def new_model(options: argparse.Namespace, vocab: int) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights: every layer has experts of half the width, embeddings are tied."""
    heads = options.width // HEAD_WIDTH
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        moe_intermediate_size=options.width // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD_WIDTH,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,  # adds the load-balancing loss while training
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Qwen3MoeForCausalLM(config)


def train(model: Qwen3MoeForCausalLM, stream: Tensor, options: argparse.Namespace) -> None:
    """AdamW with a warm-up and a cosine to a tenth, on random windows of the token stream [tokens]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
    warm_up = max(1, min(100, options.steps // 10))

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, options.steps - warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.length)
    started = shown = time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(stream) - options.length + 1, (options.batch, 1), generator=draw)
        windows = stream[starts + offsets].to(device)
        output = model(input_ids=windows, labels=windows, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        now = time.perf_counter()
        if now - shown > 5 or step in (1, options.steps):
            shown, seconds = now, now - started
            balance = output.aux_loss.item() / options.top_k  # 1 when all experts of all layers get equal shares
            print(
                f"step {step}/{options.steps}  loss {output.loss.item():.3f}  balance {balance:.2f}  "
                f"{step * options.batch * options.length / seconds:.0f} tokens/s  "
                f"{seconds / step * (options.steps - step) / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )


def perplexities(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], length: int) -> dict:
    """Perplexity per text of the saved bf16 model, on up to 16 consecutive windows; null where a text is too short."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    results: dict[str, float | None] = {}
    for name, text in sorted(texts.items()):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        windows = ids[: len(ids) // length * length].view(-1, length)[:16]
        if len(windows) == 0:
            results[name] = None
            continue
        with torch.inference_mode():
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        results[name] = round(loss.exp().item(), 3)
    return {"windows": 16, "tokens_per_window": length, "dtype": "bfloat16", "perplexity": results}


def main() -> None:
    """Split, train the tokenizer, train the model, save, judge what was saved."""
    options = arguments()
    torch.manual_seed(options.seed)
    training, held_out = split_texts(options.text)
    tokenizer = train_tokenizer(training, options.vocab)
    stream = torch.cat([torch.tensor([*tokenizer(text)["input_ids"], 0]) for text in training.values()])
    if len(stream) < options.length:
        sys.exit(f"train_tiny_moe.py: the texts hold {len(stream)} tokens; one window takes {options.length}")
    model = new_model(options, len(tokenizer))
    epochs = options.steps * options.batch * options.length / len(stream)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(stream) / 1e6:.2f} M tokens, "
        f"{epochs:.1f} epochs, vocabulary {len(tokenizer)}",
        file=sys.stderr,
    )
    train(model, stream, options)

    model.config.output_router_logits = False
    model.to("cpu", torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for part, texts in (("calibration", training), ("held_out", held_out)):
        (options.out / part).mkdir()
        for name, text in texts.items():
            (options.out / part / f"{name}.txt").write_text(text[:SLICE_CHARACTERS], encoding="utf-8")
    figures = perplexities(options.out, tokenizer, held_out, options.length)
    (options.out / "perplexity.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
