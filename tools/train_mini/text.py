"""Tokenizers and text encoders of the mini model, trained on captions alone and apart from the judge.

The Llama tower learns next-token prediction on a caption followed by statements about it, which can be predicted only
by a model that keeps the caption's facts. The CLIP tower learns to tell the four factors from its pooled output.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from hyquant.models.mini import MAX_SEQUENCE_LENGTH, PROMPT_TEMPLATE
from tools.train_mini.domain import FACTORS, Combination, training_combinations
from tools.train_mini.runs import learning_rate_share

SPECIALS = ("<pad>", "<unk>", "<bos>")
END = "<eot>"  # the highest id: CLIP towers may pool at argmax
GLUE = ("a", "on", "background", "the", "is", "describe", "video", "this", "shows", "what", "it", "and", "of", "with")
CLIP_LENGTH = 77
LLAMA_STEPS, CLIP_STEPS, BATCH = 500, 300, 32


def vocabulary() -> dict[str, int]:
    """Return the words of the domain with their ids; the end token has the highest."""
    words = [word for values in FACTORS.values() for value in values for word in value.split()]
    return {word: index for index, word in enumerate(dict.fromkeys((*SPECIALS, *GLUE, *words, END)))}


def build_tokenizer(*, adds_specials: bool, max_length: int) -> PreTrainedTokenizerFast:
    """Build a fast word tokenizer; `adds_specials` frames every text in <bos> and <eot>, as CLIP wants."""
    ids = vocabulary()
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_specials:
        tokenizer.post_processor = TemplateProcessing(
            single=f"<bos> $A {END}", special_tokens=[("<bos>", ids["<bos>"]), (END, ids[END])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=END,
        padding_side="right",
    )


def train_llama(seed: int) -> LlamaModel:
    """Train the sequence encoder; about a minute on one core."""
    torch.manual_seed(seed)
    ids = vocabulary()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids[END],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # hidden states of about unit size for the denoiser
    tokenizer = build_tokenizer(adds_specials=False, max_length=128)
    lines, pool = random.Random(seed), training_combinations()

    def loss() -> Tensor:
        texts = [_study_text(lines.choice(pool), lines) for _ in range(BATCH)]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch, labels=labels).loss

    _minimize(model, loss, LLAMA_STEPS, learning_rate=2e-3, name="llama")
    return model.model.eval()


def train_clip_text(seed: int) -> CLIPTextModel:
    """Train the pooled encoder; a few seconds on one core."""
    torch.manual_seed(seed)
    ids = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=96,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids[END],
        pad_token_id=ids["<pad>"],
    )
    model = CLIPTextModel(config)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, len(values)) for values in FACTORS.values())
    tokenizer = build_tokenizer(adds_specials=True, max_length=CLIP_LENGTH)
    lines, pool = random.Random(seed), training_combinations()

    def loss() -> Tensor:
        combinations = lines.sample(pool, BATCH)
        batch = tokenizer([c.caption for c in combinations], return_tensors="pt", return_token_type_ids=False)
        pooled = model(**batch).pooler_output
        targets = torch.tensor([c.indices for c in combinations]).T
        return torch.stack([F.cross_entropy(head(pooled), t) for head, t in zip(heads, targets, strict=True)]).sum()

    _minimize(nn.ModuleList([model, heads]), loss, CLIP_STEPS, learning_rate=1e-3, name="clip_text")
    return model.eval()


class TextConditioning:
    """Embed captions exactly as the pipeline does, once for all captions that training needs."""

    def __init__(self, llama: LlamaModel, clip_text: CLIPTextModel, captions: list[str]) -> None:
        llama_tokens = build_tokenizer(adds_specials=False, max_length=128)
        clip_tokens = build_tokenizer(adds_specials=True, max_length=CLIP_LENGTH)
        template, crop = str(PROMPT_TEMPLATE["template"]), int(PROMPT_TEMPLATE["crop_start"])
        self._row = {caption: index for index, caption in enumerate(captions)}
        with torch.no_grad():
            batch = llama_tokens(
                [template.format(caption) for caption in captions],
                padding="max_length",
                max_length=MAX_SEQUENCE_LENGTH + crop,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            hidden = llama(**batch, output_hidden_states=True).hidden_states[-3]
            self._tokens, self._mask = hidden[:, crop:], batch["attention_mask"][:, crop:]
            framed = clip_tokens(captions, padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt")
            self._pooled = clip_text(framed["input_ids"]).pooler_output

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return [B, 16, 128] token embeddings, their [B, 16] mask and [B, 96] pooled embeddings."""
        rows = torch.tensor([self._row[caption] for caption in captions])
        return self._tokens[rows], self._mask[rows], self._pooled[rows]


def _study_text(combination: Combination, lines: random.Random) -> str:
    """Return a caption in the pipeline's template, then shuffled statements that follow from it."""
    shape, colour, motion, background = (v[i] for v, i in zip(FACTORS.values(), combination.indices, strict=True))
    statements = [
        f"the {shape} is {colour}",
        f"it is {motion}",
        f"the background is {background}",
        f"this is a video of a {shape}",
        f"what is {colour} and {motion} is a {shape}",
        f"a {shape} with a {background} background",
        f"on the {background} background it is {motion}",
    ]
    chosen = " ".join(lines.sample(statements, 4))
    return f"{str(PROMPT_TEMPLATE['template']).format(combination.caption)} {chosen} {END}"


def _minimize(
    model: nn.Module, loss_of_batch: Callable[[], Tensor], num_steps: int, *, learning_rate: float, name: str
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_share(step, num_steps, warm_up=30)
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == num_steps - 1:
            print(f"{name} step={step} loss={loss.item():.4f}", flush=True)
