"""`generate`: arguments as in transformers' own diffusion models, those of the released GIDD code accepted as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .sampling_gidd import HybridNoise, Noise, Settings, generate

_FROM_GENERATION_CONFIG = (
    "max_new_tokens",
    "max_denoising_steps",
    "block_length",
    "sampler",
    "tokens_per_step",
    "temperature",
)
"""What the folder's generation_config.json may set. Not `top_k` and `top_p`: transformers fills in its own."""

_BISECTIONS = 60


@dataclass
class GiddGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns."""

    sequences: Tensor | None = None
    """[B, prompt + new tokens]."""
    tokens_per_forward: Tensor | None = None
    """[B] new tokens over the number of times the model was run."""


@dataclass(frozen=True)
class TimeNoise:
    """Noise in the time form of arXiv:2503.04482, by its level.

    With c = B (t (1 - t))^(gamma / 2), B = 2^gamma p / (1 - p): log_snr = log((1 - t) / (t + c)), u = c / (t + c).
    """

    vocab_size: int
    mask_id: int
    p_uniform: float
    gamma: float

    def u(self, log_snr: Tensor) -> Tensor:
        """Uniform share of the noise, t found by bisection."""
        c_over_t = self._c_over_t(self._logit_t(log_snr.double()))
        return (c_over_t / (1 + c_over_t)).to(log_snr.dtype)

    def mask_share(self, log_snr: Tensor) -> Tensor:
        """1 - u."""
        return (1 / (1 + self._c_over_t(self._logit_t(log_snr.double())))).to(log_snr.dtype)

    def _logit_t(self, log_snr: Tensor) -> Tensor:
        low, high = torch.full_like(log_snr, -80.0), torch.full_like(log_snr, 80.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_too_clean = -middle - torch.log1p(self._c_over_t(middle)) > log_snr
            low, high = torch.where(is_too_clean, middle, low), torch.where(is_too_clean, high, middle)
        return (low + high) / 2

    def _c_over_t(self, logit_t: Tensor) -> Tensor:
        log_t, log_rest = torch.nn.functional.logsigmoid(logit_t), torch.nn.functional.logsigmoid(-logit_t)
        b = 2.0**self.gamma * self.p_uniform / (1 - self.p_uniform)
        return b * torch.exp((log_t + log_rest) * self.gamma / 2 - log_t)


class _PrefixCache:
    """Keys and values of the finished text, which attends to itself alone."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode_prefix(self, ids: Tensor, previous: Any | None) -> Any:
        """Keys and values of ids [B, P]; where it attends causally, those of `previous` are kept."""
        length = ids.shape[1]
        if length == 0:
            return None
        past = previous if self._model.config.prompt_attention == "causal" else None
        known = 0 if past is None else past[0][0].shape[2]
        lengths = torch.full((len(ids),), length, device=ids.device)
        out = self._model.model(ids[:, known:], cache=past, prompt_lengths=lengths, use_cache=True)
        return out.cache

    def denoise_block(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits of what follows the prefix and sees all of it."""
        return self._model(ids, cache=cache).logits


class GiddGeneration:
    """Mixed into the model; uses its `config`, `generation_config`, `device` and call."""

    config: Any
    generation_config: Any
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        use_cache: bool = True,
        streamer: Any = None,
        generation_config: Any = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> Tensor | GiddGenerateOutput:
        """Write new tokens behind a prompt, or in its holes.

        Args:
            input_ids: [B, P] prompts of one length, -1 where a token is to be filled in; none: one row that begins with
                bos. `inputs`, as the released code has it, means the same.
            attention_mask: must be all ones.
            seed: one for all rows or one a row; a row's text does not depend on the others.
            use_cache: keep the keys and values of finished blocks, where the model was trained with prompts that see
                only themselves.
            streamer: `put` gets the prompts and each finished block, `put_draft` (if it has one) the block after each
                step, `end` nothing.
            generation_config: further defaults; the folder's are taken for what neither it nor `settings` gives.
            return_dict_in_generate: return a `GiddGenerateOutput` instead of its `sequences`.
            **settings: fields of `Settings` (sampling_gidd.py): `max_new_tokens`, `max_denoising_steps`,
                `block_length`, `sampler`, `tokens_per_step`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
                `min_new_tokens`, ...; or the released names `max_length` (of new tokens), `steps`, `min_length`,
                `sampling_method`, `noise_schedule`; `do_sample=False` means temperature 0.

        Returns:
            [B, P + new tokens] ids without masks; behind a row's first eos among the new tokens stands padding.
        """
        prompt = self._prompt(input_ids if inputs is None else inputs, attention_mask)
        chosen = self._settings(settings, generation_config)
        length, most = prompt.shape[1] + chosen.max_new_tokens, self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"prompt and new tokens are {length} tokens, the model was trained on rows of {most}")
        is_cached = use_cache and self.config.prompt_attention != "full"
        found = generate(
            self._denoise,
            prompt,
            chosen,
            self._noise(),
            seed=seed,
            cache=_PrefixCache(self) if is_cached else None,
            streamer=streamer,
        )
        if not return_dict_in_generate:
            return found.sequences
        return GiddGenerateOutput(sequences=found.sequences, tokens_per_forward=found.tokens_per_forward)

    def _denoise(self, ids: Tensor, prefix_length: int) -> Tensor:
        lengths = torch.full((len(ids),), prefix_length, device=ids.device)
        return self(ids, prompt_lengths=lengths if prefix_length else None).logits  # type: ignore[operator]

    def _noise(self) -> Noise:
        config = self.config
        if config.noise_p_uniform is not None and config.noise_p_uniform > 0:
            return TimeNoise(config.vocab_size, config.mask_token_id, config.noise_p_uniform, config.noise_gamma)
        shift = config.noise_type if config.noise_p_uniform is None else -1000.0
        return HybridNoise(config.vocab_size, config.mask_token_id, shift, config.noise_scale)

    def _settings(self, given: dict[str, Any], asked: Any) -> Settings:
        config, names = self.config, {key: value for key, value in given.items() if value is not None}
        if names.pop("do_sample", True) is False:
            names["temperature"] = 0.0
        defaults: dict[str, Any] = {
            "max_new_tokens": 128,
            "min_log_snr": config.min_log_snr,
            # The time form ends at a level that still holds noise; sampling goes on to where next to none is left.
            "max_log_snr": max(9.0, config.max_log_snr),
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
        for source in (self.generation_config, asked):
            said = {key: getattr(source, key, None) for key in _FROM_GENERATION_CONFIG}
            defaults |= {key: value for key, value in said.items() if value is not None}
        own = {"max_length": "max_new_tokens", "steps": "max_denoising_steps", "sampling_method": "sampler"}
        replaced = {own.get(key, key) for key in names}
        return Settings.from_names(**{k: v for k, v in defaults.items() if k not in replaced}, **names)

    def _prompt(self, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.config.is_causal:
            raise ValueError("this is an autoregressive control: it predicts next tokens and cannot denoise")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("prompts of unequal length cannot be mixed in one call; generate them one by one")
        if ids is None:
            first = self.config.bos_token_id
            ids = torch.full((1, 0 if first is None else 1), first or 0, dtype=torch.int64)
        return ids.to(self.device)
