"""Prompts to embeddings with HunyuanVideo's two text encoders, each prompt once.

A prompt that does not fit, or that the tokenizer does not know, gives an error: the pipeline itself would cut it or
encode it as "unknown" without a word.
"""

from typing import TYPE_CHECKING, Any

import torch

from hyquant.errors import ConfigError
from hyquant.models.embedding import TextEmbedding

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

_LISTABLE_VOCABULARY = 500


class PromptEncoder:
    """Embeds prompts and remembers them on the CPU. The encoders visit `device` only while they work.

    Args:
        encoders: Pipeline that holds the text encoders and tokenizers; other components may be None.
        prompt_template: "template" with one pair of braces, and "crop_start", the number of its tokens before the
            prompt; None for the template of the published weights.
        max_sequence_length: Longest prompt in tokens, template tokens before it not counted.
        device: Where embeddings are computed.
    """

    def __init__(
        self,
        encoders: "HunyuanVideoPipeline",
        *,
        prompt_template: dict[str, str | int] | None,
        max_sequence_length: int,
        device: torch.device,
    ) -> None:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        self.max_sequence_length = max_sequence_length
        self._encoders = encoders
        self._template: dict[str, Any] = prompt_template or DEFAULT_PROMPT_TEMPLATE
        self._device = device
        self._embeddings: dict[str, TextEmbedding] = {}

    @property
    def template(self) -> dict[str, Any]:
        """Return the prompt template in use."""
        return dict(self._template)

    def embed(self, prompts: list[str]) -> list[TextEmbedding]:
        """Return one embedding per prompt, on the CPU, without padding.

        Raises:
            ConfigError: If a prompt is too long or holds unknown words.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        for prompt in new:
            self._check(prompt)
        if new:
            self._embeddings |= self._encode(new)
        return [self._embeddings[prompt] for prompt in prompts]

    def longest(self) -> TextEmbedding | None:
        """Return the embedding with most tokens so far; None before the first prompt."""
        return max(self._embeddings.values(), key=lambda embedding: embedding.tokens.shape[0], default=None)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, TextEmbedding]:
        """Encode prompts one by one, so that nothing depends on which prompts come together."""
        modules = (self._encoders.text_encoder, self._encoders.text_encoder_2)
        for module in modules:
            module.to(self._device)
        embeddings = {prompt: self._encode_one(prompt) for prompt in prompts}
        for module in modules:
            module.to("cpu")
        return embeddings

    def _encode_one(self, prompt: str) -> TextEmbedding:
        tokens, pooled, mask = self._encoders.encode_prompt(
            prompt=[prompt],
            prompt_template=self._template,
            max_sequence_length=self.max_sequence_length,
            device=self._device,
        )
        return TextEmbedding(tokens=tokens[0][mask[0].bool()].cpu(), pooled=pooled[0].cpu())

    def _check(self, prompt: str) -> None:
        tokenizer = self._encoders.tokenizer
        ids = tokenizer(str(self._template["template"]).format(prompt))["input_ids"]
        length = len(ids) - int(self._template["crop_start"])
        if length > self.max_sequence_length:
            raise ConfigError(
                f"a prompt must fit into {self.max_sequence_length} tokens, but got {length} for {_shorten(prompt)!r}; "
                "shorten it"
            )
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            return
        unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]
        raise ConfigError(
            f"every word of a prompt must be in the model's vocabulary, but got {', '.join(map(repr, unknown))} in "
            f"{_shorten(prompt)!r}; {_vocabulary_hint(tokenizer)}"
        )


def _vocabulary_hint(tokenizer: Any) -> str:
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    if len(words) > _LISTABLE_VOCABULARY:
        return "use other words"
    return f"it knows {' '.join(words)}"


def _shorten(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
