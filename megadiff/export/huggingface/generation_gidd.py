"""Method `generate`, with the arguments of transformers' own diffusion models and those of the released GIDD code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .sampling_gidd import HybridNoise, Noise, Settings, generate

_OFF: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "top_h": 1.0,
    "typical_p": 1.0,
}
"""Values of unsupported options of transformers that have no effect, besides None, False and empty ones."""

_WITHOUT_EFFECT = (
    "assistant_tokenizer",
    "bos_token_id",
    "disable_compile",
    "low_memory",
    "synced_gpus",
    "token_type_ids",
    "tokenizer",
    "transformers_version",
)
"""Arguments that transformers and its pipelines pass to every model and that are ignored here."""

_OF_THE_CALL = ("num_return_sequences", "return_dict_in_generate", "use_cache")
"""Fields of a generation config that are arguments of `generate` here."""

_OPTIONS = (
    "assistant_model",
    "custom_generate",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
)
"""Options of transformers' own `generate` that are not fields of its `GenerationConfig`."""

_BISECTIONS = 60


@dataclass
class GiddGenerateOutput(ModelOutput):
    """Result of `generate(..., return_dict_in_generate=True)`."""

    sequences: Tensor | None = None
    """Prompt and new tokens, [B, prompt + new tokens]."""
    tokens_per_forward: Tensor | None = None
    """Number of new tokens divided by the number of forward passes, [B]."""


@dataclass(frozen=True)
class TimeNoise:
    """Noise in the time form of arXiv:2503.04482, as a function of its level.

    With c = B (t (1 - t))^(gamma / 2), B = 2^gamma p / (1 - p): log_snr = log((1 - t) / (t + c)), u = c / (t + c).
    """

    vocab_size: int
    mask_id: int
    p_uniform: float
    gamma: float

    def uniform_prob(self, log_snr: Tensor) -> Tensor:
        """Return the uniform share of the noise, with t found by bisection."""
        c_over_t = self._c_over_t(self._logit_t(log_snr.double()))
        return (c_over_t / (1 + c_over_t)).to(log_snr.dtype)

    def mask_prob(self, log_snr: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class TableNoise:
    """Noise given by a table of logit u and its slope at equal steps of log-SNR, interpolated by cubic polynomials.

    Beyond the ends of the table the value at the end holds.
    """

    vocab_size: int
    mask_id: int
    min_log_snr: float
    max_log_snr: float
    logit_u: Sequence[float]
    dlogit_u: Sequence[float]

    def uniform_prob(self, log_snr: Tensor) -> Tensor:
        """Return the uniform share of the noise."""
        return torch.sigmoid(self._logit_u(log_snr))

    def mask_prob(self, log_snr: Tensor) -> Tensor:
        """1 - u."""
        return torch.sigmoid(-self._logit_u(log_snr))

    def _logit_u(self, log_snr: Tensor) -> Tensor:
        count = len(self.logit_u) - 1
        step = (self.max_log_snr - self.min_log_snr) / count
        place = ((log_snr.double() - self.min_log_snr) / step).clamp(0, count)
        left = place.long().clamp(max=count - 1)
        x = place - left
        logit = torch.tensor(self.logit_u, dtype=torch.float64, device=log_snr.device)
        slope = torch.tensor(self.dlogit_u, dtype=torch.float64, device=log_snr.device) * step
        y0, y1, d0, d1 = logit[left], logit[left + 1], slope[left], slope[left + 1]
        value = (1 + 2 * x) * (1 - x) ** 2 * y0 + x**2 * (3 - 2 * x) * y1 + x * (1 - x) ** 2 * d0 - x**2 * (1 - x) * d1
        return value.to(log_snr.dtype)


class _PrefixCache:
    """Keys and values of the finished text, which attends only to itself, with the hidden states of its last token."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode_prefix(self, ids: Tensor, previous: Any | None) -> Any:
        """Return keys and values of ids [B, P]; with causal attention, those of `previous` are reused."""
        length = ids.shape[1]
        if length == 0:
            return None
        past = previous[0] if previous and self._model.config.prompt_attention == "causal" else None
        known = 0 if past is None else past[0][0].shape[2]
        lengths = torch.full((len(ids),), length, device=ids.device)
        out = self._model.model(ids[:, known:], cache=past, prompt_lengths=lengths, use_cache=True)
        return out.cache, out.last_hidden_state[:, -1:]

    def denoise_block(self, ids: Tensor, cache: Any) -> Tensor:
        """Return the logits of a block that follows the prefix and attends to all of it."""
        keys_and_values, hidden = cache or (None, None)
        return self._model(ids, cache=keys_and_values, hidden_before=hidden).logits


class GiddGeneration:
    """Mixin of the model that generates text; uses its `config`, `generation_config`, `device` and call."""

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
        num_return_sequences: int | None = None,
        use_cache: bool | None = None,
        streamer: Any = None,
        generation_config: Any = None,
        return_dict_in_generate: bool | None = None,
        **settings: Any,
    ) -> Tensor | GiddGenerateOutput:
        """Generate new tokens after a prompt, or fill in its gaps.

        Args:
            input_ids: [B, P] prompts, -1 where a token is to be filled in; None generates one sequence, which begins
                with bos unless the training data's documents did not.
            inputs: the same under the name in the released code.
            attention_mask: [B, P], 0 where a shorter prompt is padded on the left, 1 elsewhere. Prompts of each length
                are processed separately, so the padding is never seen and a text is the same as alone.
            seed: one for all prompts or one per prompt; a sequence's text does not depend on the others.
            num_return_sequences: number of texts per prompt, one after the other; the first is the same as with 1.
            use_cache: keep the keys and values of finished blocks if the model was trained with prompts that attend
                only to themselves; the default.
            streamer: `put` gets the prompts and each finished block, `put_draft` (if it has one) the block after each
                step, `end` nothing. Its prompts must have one length.
            generation_config: further settings, such as a `GenerationConfig`; the folder's own apply to whatever
                neither it nor `settings` sets.
            return_dict_in_generate: return a `GiddGenerateOutput` instead of its `sequences`.
            **settings: fields of `Settings` (sampling_gidd.py): `max_new_tokens`, `max_denoising_steps`,
                `block_length`, `sampler`, `tokens_per_step`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
                `min_new_tokens`, `eos_token_id` (one or a list), `pad_token_id`, ...; or the released names
                `max_length` (number of new tokens, unlike transformers'), `steps`, `min_length`, `sampling_method`,
                `noise_schedule`; `do_sample=False` means temperature 0. None leaves a setting unchanged.

        Returns:
            [B * num_return_sequences, P + new tokens] ids without masks; after a sequence's first eos among the new
            tokens there is padding.

        Raises:
            TypeError: a setting is unknown, or not supported for text generated in blocks (beams, scores of each
                token, stopping criteria, ...).
            ValueError: a value is out of its range, or prompt and new tokens are longer than the model's sequences.
        """
        prompt = self._prompt(input_ids, inputs)
        lengths = _lengths(prompt, attention_mask)
        of_the_call = (num_return_sequences, return_dict_in_generate, use_cache)
        given = {**settings, **dict(zip(_OF_THE_CALL, of_the_call, strict=True))}
        chosen = _merged(self.generation_config, generation_config, given)
        copies, wants_dict, is_cached = (
            chosen.pop(name, usual) for name, usual in zip(_OF_THE_CALL, (1, False, True), strict=True)
        )
        draws = _draws(seed, len(prompt), copies)
        found = self._texts(prompt, lengths, self._settings(chosen), draws, is_cached, streamer)
        return found if wants_dict else found.sequences  # type: ignore[return-value]

    def _texts(
        self,
        prompt: Tensor,
        lengths: list[int],
        settings: Settings,
        draws: list[list[tuple[int, int]]],
        use_cache: bool,
        streamer: Any,
    ) -> GiddGenerateOutput:
        """Generate texts for the prompts of each length together.

        Args:
            lengths: length of every prompt, at the right end of its number of `prompt`.
            draws: (seed, number under it) of every text of every prompt.
        """
        count, width, copies = len(prompt), prompt.shape[1], len(draws[0]) if draws else 1
        length, most = max(lengths, default=0) + settings.max_new_tokens, self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"prompt and new tokens are {length} tokens, the model was trained on sequences of {most}")
        if streamer is not None and len(set(lengths)) > 1:
            raise ValueError("a streamer takes prompts of one length; generate the others in calls of their own")
        whole = torch.nn.functional.pad(prompt, (0, settings.max_new_tokens))
        sequences = whole.repeat_interleave(copies, dim=0)
        per_forward = torch.zeros(count * copies, device=self.device)
        is_cached = use_cache and self.config.prompt_attention != "full"
        for own in sorted(set(lengths)):
            chosen = [number for number in range(count) if lengths[number] == own]
            texts = [number * copies + copy for number in chosen for copy in range(copies)]
            pairs = [draws[number][copy] for number in chosen for copy in range(copies)]
            found = generate(
                self._denoise,
                sequences[texts, width - own : width],
                settings,
                self._noise(),
                seed=[seed for seed, _ in pairs],
                sequences=torch.tensor([number for _, number in pairs]),
                cache=_PrefixCache(self) if is_cached else None,
                streamer=streamer,
            )
            sequences[texts, width - own :] = found.sequences
            per_forward[texts] = found.tokens_per_forward.to(per_forward.dtype)
        return GiddGenerateOutput(sequences=sequences, tokens_per_forward=per_forward)

    def _denoise(self, ids: Tensor, prefix_length: int) -> Tensor:
        lengths = torch.full((len(ids),), prefix_length, device=ids.device)
        return self(ids, prompt_lengths=lengths if prefix_length else None).logits  # type: ignore[operator]

    def _noise(self) -> Noise:
        config = self.config
        if config.noise_table is not None:
            return TableNoise(config.vocab_size, config.mask_token_id, **config.noise_table)
        if config.noise_p_uniform is not None and config.noise_p_uniform > 0:
            return TimeNoise(config.vocab_size, config.mask_token_id, config.noise_p_uniform, config.noise_gamma)
        shift = config.noise_type if config.noise_p_uniform is None else -1000.0
        return HybridNoise(config.vocab_size, config.mask_token_id, shift, config.noise_scale)

    def _settings(self, given: dict[str, Any]) -> Settings:
        config = self.config
        defaults: dict[str, Any] = {
            "max_new_tokens": 128,
            "min_log_snr": config.min_log_snr,
            # The time form ends at a level with noise left; sampling continues until almost none is left.
            "max_log_snr": max(9.0, config.max_log_snr),
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
        found = Settings(**{**defaults, **given})
        for name, ids in (("eos_token_id", found.end_ids), ("pad_token_id", (found.pad_token_id,))):
            wrong = [one for one in ids if one is not None and not 0 <= one < config.vocab_size]
            if wrong:
                raise ValueError(f"{name} is {wrong[0]}, wanted an id from 0 to {config.vocab_size - 1}")
        return found

    def _prompt(self, ids: Tensor | None, inputs: Tensor | None) -> Tensor:
        """Return the prompts, [B, P] int64."""
        if self.config.is_causal:
            raise ValueError("this is an autoregressive control: it predicts next tokens and cannot denoise")
        if ids is not None and inputs is not None:
            raise ValueError("give input_ids or inputs, which mean the same, not both")
        ids = inputs if ids is None else ids
        if ids is None:
            first = None if self.config.prepended_bos is False else self.config.bos_token_id
            ids = torch.full((1, 0 if first is None else 1), first or 0, dtype=torch.int64)
        ids = torch.as_tensor(ids)
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"input_ids must be ids [batch, length], got {ids.dtype} of shape {list(ids.shape)}")
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"input_ids go from {int(ids.min())} to {int(ids.max())}, wanted ids from 0 to "
                f"{self.config.vocab_size - 1}, or -1 for a token to fill in"
            )
        return ids.to(self.device, torch.int64)


def _lengths(prompt: Tensor, mask: Tensor | None) -> list[int]:
    """Return the number of tokens of each prompt, which may be preceded by padding."""
    count, width = prompt.shape
    if mask is None:
        return [width] * count
    mask = torch.as_tensor(mask).to(prompt.device)
    if mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(prompt.shape)}; wanted the same"
        )
    lengths = mask.bool().sum(dim=1)
    if not bool((mask.bool() == (torch.arange(width, device=prompt.device) >= width - lengths[:, None])).all()):
        raise ValueError(
            "attention_mask may be 0 only where prompts are padded on the left; set tokenizer.padding_side = 'left'"
        )
    return lengths.tolist()


def _draws(seed: int | Sequence[int], count: int, copies: int) -> list[list[tuple[int, int]]]:
    """Return (seed, number under it) for each of the `copies` texts of each of `count` prompts.

    The first text of a prompt has the same numbers as alone.
    """
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"num_return_sequences must be a whole number of at least 1, got {copies!r}")
    if isinstance(seed, int):
        return [[(seed, number + copy * count) for copy in range(copies)] for number in range(count)]
    seeds = [int(one) for one in seed]
    if len(seeds) == count * copies and copies > 1:
        return [[(seeds[number * copies + copy], 0) for copy in range(copies)] for number in range(count)]
    if len(seeds) != count:
        raise ValueError(f"wanted one seed or one for each of {count} prompts, got {len(seeds)}")
    return [[(one, copy) for copy in range(copies)] for one in seeds]


def _merged(folders: Any, asked: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the folder, of a generation config and of the call; later ones take precedence.

    Raises:
        TypeError: one is unknown, or an option of transformers that is not supported here is turned on.
    """
    merged: dict[str, Any] = {}
    for source in (_set_in(folders), _set_in(asked), given):
        found = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in source.items()
            if value is not None
        }
        for name in [name for name in found if not _is_setting(name)]:
            _refuse(name, found.pop(name))
        if source is not given and "max_new_tokens" in found:
            found.pop("max_length", None)  # as in transformers, where max_length counts the prompt too
        if found.pop("do_sample", True) is False:
            found["temperature"] = 0.0
        merged |= {name: found.pop(name) for name in _OF_THE_CALL if name in found} | Settings.own_names(**found)
    return merged


def _set_in(config: Any) -> dict[str, Any]:
    """Return the settings of a generation config; transformers 4 fills in its own defaults, which are left out."""
    if config is None or isinstance(config, dict):
        return config or {}
    return {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}


def _is_setting(name: str) -> bool:
    return name in ("do_sample", *_OF_THE_CALL) or name in Settings.names()


def _refuse(name: str, value: Any) -> None:
    """Refuse an argument that is not a setting, unless it has no effect."""
    settings = f"the settings are {', '.join(Settings.names())}, do_sample, num_return_sequences and seed"
    if name in _WITHOUT_EFFECT:
        return
    if name not in _OPTIONS and not hasattr(GenerationConfig(), name):
        raise TypeError(f"unknown setting {name!r}; {settings}")
    is_nothing = value is False or (hasattr(value, "__len__") and len(value) == 0)
    if not is_nothing and not (name in _OFF and value == _OFF[name]):
        raise TypeError(f"{name}={value!r:.60} is not supported, as text is denoised in blocks; {settings}")
