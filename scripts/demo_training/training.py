"""Tokenizer, model shapes and the two training loops of the demo models."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxy_vllm.demo import ROLES
from proxy_vllm.demo.corpus import pretraining_documents, tuning_problems
from proxy_vllm.demo.problems import Problem

VOCAB_SIZE = 1024
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\nA:' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the models, besides the generated text."""

    base_shape: tuple[int, int, int, int, int] = (256, 640, 3, 8, 4)
    small_shape: tuple[int, int, int, int, int] = (96, 256, 2, 3, 3)
    pretrain_tokens: int = 3_000_000
    block: int = 128
    pretrain_batch: int = 32
    base_lr: float = 2e-3
    small_lr: float = 4e-3
    tune_steps: int = 100
    tune_batch: int = 32
    base_tune_lr: float = 1e-4
    small_tune_lr: float = 1e-3


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1024 tokens; every encoding starts with the begin token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(itertools.islice(pretraining_documents(seed), 20_000), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(
    tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int, int, int, int], seed: int
) -> LlamaForCausalLM:
    """A Llama of (hidden, intermediate, layers, heads, key/value heads), head size 32."""
    hidden, intermediate, layers, heads, kv_heads = shape
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretraining_blocks(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> torch.Tensor:  # [n, block] int64
    """Documents end to end, each with its begin and end token, cut into equal blocks."""
    documents = pretraining_documents(seed)
    ids: list[int] = []
    while len(ids) < recipe.pretrain_tokens:
        chunk = list(itertools.islice(documents, 4096))
        for encoding in tokenizer(chunk)["input_ids"]:
            ids += [*encoding, tokenizer.eos_token_id]
    n = recipe.pretrain_tokens // recipe.block
    return torch.tensor(ids[: n * recipe.block]).view(n, recipe.block)


def tuning_batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, problems: Iterator[Problem]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # ids, labels [B, T]
    """Prompt and answer, padded on the right; only the answer and its end token carry loss."""
    for _ in range(recipe.tune_steps):
        rows, labels = [], []
        for problem in itertools.islice(problems, recipe.tune_batch):
            prompt = tokenizer(problem.prompt)["input_ids"]
            answer = tokenizer(f" {problem.answer}", add_special_tokens=False)["input_ids"]
            answer.append(tokenizer.eos_token_id)
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        yield (
            pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad(labels, batch_first=True, padding_value=-100),
        )


def fit(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    lr: float,
    say: Callable[[str], None],
) -> None:
    """AdamW with a warm-up of 5 % and a cosine down to a twentieth of `lr`; in place."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    start = time.monotonic()
    for step, (ids, labels) in enumerate(batches):
        logits = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            say(f"step {step + 1}/{steps} loss {loss.item():.3f} {time.monotonic() - start:.0f}s")
    model.eval()


def round_to_stored(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """float32 weights with the values that the saved bfloat16 ones have; in place."""
    return model.to(torch.bfloat16).float()


def pretrain(
    model: LlamaForCausalLM,
    blocks: torch.Tensor,  # [n, block]
    recipe: Recipe,
    lr: float,
    say: Callable[[str], None],
) -> None:
    steps = len(blocks) // recipe.pretrain_batch
    batches = ((rows, rows) for rows in blocks.split(recipe.pretrain_batch)[:steps])
    fit(model, batches, steps, lr, say)


def tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    lr: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    batches = tuning_batches(tokenizer, recipe, tuning_problems(seed))
    fit(model, batches, recipe.tune_steps, lr, say)


def load(folder: Path) -> dict:
    """The four models in float32 and their tokenizer, by role, as `save` left them."""
    made = {
        role: LlamaForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval()
        for role in ROLES
    }
    made["tokenizer"] = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    return made


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A complete Hugging Face folder, weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
