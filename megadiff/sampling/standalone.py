"""Sampling of text from noise: all its mathematics in one file that needs torch alone.

This file is copied beside an exported model, so it imports nothing of this project; the rest of `megadiff.sampling`
builds on it. A step of the *ancestral* sampler undoes a step of the forward process at every position; a step of the
*adaptive* one rewrites the few positions where the model disagrees most surely with the present token
(arXiv:2512.10858, section 2.2 and appendix A.1). `generate` applies either to one block or to one after another, for
masked, uniform and hybrid noise. Axes: B sequences, L positions of a sequence, W positions of the window being
denoised, V vocabulary, mask included.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], Tensor]
"""Model as a function of (ids [B, L] int64, length of the clean prefix) to logits [B, L, V or more]; the mask's logit
is ignored.
"""

Positions = tuple[Tensor, Tensor]
"""Indices of sequences and of positions of the window, [n] each."""

_WORD = 0xFFFFFFFF
_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**26
"""Number of probabilities that are made together; on a CPU for each thread, and few enough for its cache."""
_RELEASED_NAMES = {
    "steps": "max_denoising_steps",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "sampling_method": "sampler",
    "noise_schedule": "grid",
}


class Noise(Protocol):
    """The interface of a noise process: noise is a uniform real token with probability u, else the mask."""

    @property
    def vocab_size(self) -> int:
        """Number of ids V, mask included."""
        ...

    @property
    def mask_id(self) -> int:
        """Id of the mask."""
        ...

    def uniform_prob(self, log_snr: Tensor) -> Tensor:
        """Return the uniform share of the noise."""
        ...

    def mask_prob(self, log_snr: Tensor) -> Tensor:
        """1 - u, without the subtraction."""
        ...


@dataclass(frozen=True)
class HybridNoise:
    """Noise with u = sigmoid(scale * log_snr + shift); shift -1000 is pure masking, 1000 purely uniform."""

    vocab_size: int
    mask_id: int
    shift: float
    scale: float = 1.0

    def uniform_prob(self, log_snr: Tensor) -> Tensor:
        """Return the uniform share of the noise."""
        return torch.sigmoid(self.scale * log_snr + self.shift)

    def mask_prob(self, log_snr: Tensor) -> Tensor:
        """1 - u."""
        return torch.sigmoid(-(self.scale * log_snr + self.shift))


@dataclass(frozen=True)
class Settings:
    """Settings of the sampler; `from_names` also accepts the released models' names for them.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int
    """Number of positions after the prompt."""
    max_denoising_steps: int = 128
    """Number of steps per block."""
    block_length: int | None = None
    """Number of positions denoised together, block by block from left to right; None: all at once."""
    sampler: str = "ancestral"
    """Name of the sampler: ancestral or adaptive."""
    tokens_per_step: int | None = None
    """Number of positions that an adaptive step rewrites; None: just enough to fill a block in its steps."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most probable token."""
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance: logits without the prompt + scale (with - without); 1 is off."""
    grid: str = "cosine"
    min_log_snr: float = -9.0
    max_log_snr: float = 9.0
    eos_token_id: int | Sequence[int] | None = None
    """Token, or tokens, that end a sequence in a finished block after the prompt; None: sequences never end early."""
    pad_token_id: int | None = None
    """Token that follows the end; None: the (first) end token."""
    min_new_tokens: int = 0
    """Minimal number of new tokens before an end."""
    see_tail: bool = True
    """Whether the model sees the noise of later blocks, as in training, rather than a sequence cut after the window."""
    reuse_logits: bool = True
    """Whether to skip the model if a step changed no token."""

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 0, "max_denoising_steps": 1, "min_new_tokens": 0}
        least |= {"block_length": 1, "tokens_per_step": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and _whole_number(name, value) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        for token in self.end_ids:
            _whole_number("eos_token_id", token)
        _check_truncation(self.temperature, self.top_k, self.top_p)
        if self.sampler not in ("ancestral", "adaptive"):
            raise ValueError(f"sampler must be ancestral or adaptive, got {self.sampler!r}")
        log_snr_steps(1, grid=self.grid)
        self.check_reach(min(self.max_new_tokens, self.block_length or self.max_new_tokens))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence; empty if sequences never end early."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, Sequence) else (self.eos_token_id,)

    def check_reach(self, width: int) -> None:
        """Refuse adaptive steps too few to write a block of this width: noise would be left.

        Raises:
            ValueError: they are too few.
        """
        count = self.tokens_per_step
        if self.sampler == "adaptive" and count is not None and count * self.max_denoising_steps < width:
            raise ValueError(
                f"tokens_per_step ({count}) times max_denoising_steps ({self.max_denoising_steps}) does not reach the "
                f"{width} positions of a block: noise would be left"
            )

    @classmethod
    def from_names(cls, **names: Any) -> Settings:
        """Return settings by the names above or the released ones (steps, max_length, ...); None leaves one unset.

        Raises:
            TypeError: a name is unknown or given twice.
        """
        return cls(**cls.own_names(**names))

    @classmethod
    def own_names(cls, **names: Any) -> dict[str, Any]:
        """Return settings under the names of the fields above, without those that are None.

        Raises:
            TypeError: a name is unknown, or given twice with different values.
        """
        given: dict[str, Any] = {}
        for name, value in names.items():
            field = _RELEASED_NAMES.get(name, name)
            if field not in cls.names():
                raise TypeError(f"unknown setting {name!r}; the settings are {', '.join(cls.names())}")
            if value is not None and given.setdefault(field, value) != value:
                raise TypeError(f"{field} is given twice, as {given[field]} and {value}")
        return given

    @classmethod
    def names(cls) -> list[str]:
        """Return every name that `from_names` accepts."""
        return [known.name for known in fields(cls)] + list(_RELEASED_NAMES)


class CounterRNG:
    """Random numbers as a function of (seed, sequence, draw, position): Philox4x32-10, without state.

    Args:
        seed: one for all sequences, or one per sequence.
        sequences: [B] int64 that number the sequences under a seed.
        device: device on which the numbers are made.
    """

    def __init__(self, seed: int | Sequence[int], sequences: Tensor, device: torch.device | str) -> None:
        self._seeds = [seed] * len(sequences) if isinstance(seed, int) else list(seed)
        if len(self._seeds) != len(sequences):
            raise ValueError(f"wanted one seed or one for each of {len(sequences)} sequences, got {len(self._seeds)}")
        self._sequences, self._device = sequences.to(device).unsqueeze(-1), device
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}

    def words(self, name: str, start: int, stop: int, *, draw: int = 0) -> tuple[Tensor, ...]:
        """Return four 32-bit words for positions start to stop of each sequence, [B, stop - start] int64 each."""
        position = torch.arange(start, stop, device=self._device).expand(len(self._seeds), -1)
        c0, c1 = position, torch.full_like(position, draw)
        c2, c3 = (self._sequences & _WORD).expand_as(c0), (self._sequences >> 32 & _WORD).expand_as(c0)
        key_0, key_1 = self._key(name)
        for step in range(10):
            k0, k1 = (key_0 + step * 0x9E3779B9) & _WORD, (key_1 + step * 0xBB67AE85) & _WORD
            one, two = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: the sign bit is masked off below
            c0, c2 = (two >> 32 & _WORD) ^ c1 ^ k0, (one >> 32 & _WORD) ^ c3 ^ k1
            c1, c3 = two & _WORD, one & _WORD
        return c0, c1, c2, c3

    def step_uniforms(self, start: int, stop: int, *, draw: int) -> Tensor:
        """Return three uniform numbers on [0, 1) per position, [3, B, stop - start] float64; the first has 53 bits."""
        words = self.words("sample/step", start, stop, draw=draw)
        return torch.stack([_unit_interval(words), *(word.double() * 2.0**-32 for word in words[2:])])

    def noise(self, length: int, log_snr: float, noise: Noise, *, name: str = "sample/prior") -> Tensor:
        """Return pure noise of this level, [B, length]: masks, or uniform tokens that are never the mask."""
        words = self.words(name, 0, length)
        count = noise.vocab_size - 1
        token = (words[2] * count + (words[3] * count >> 32)) >> 32
        share = noise.uniform_prob(torch.tensor(log_snr, dtype=torch.float64, device=self._device))
        real = token + (token >= noise.mask_id).long()
        return torch.where(_unit_interval(words) < share, real, noise.mask_id)

    def _key(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._keys:
            digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for seed in self._seeds]
            parts = [[int.from_bytes(d[i : i + 4], "little") for d in digests] for i in (0, 4)]
            low, high = (torch.tensor(p, dtype=torch.int64, device=self._device).unsqueeze(-1) for p in parts)
            self._keys[name] = low, high
        return self._keys[name]


def log_snr_steps(
    steps: int, *, grid: str = "cosine", min_log_snr: float = -9.0, max_log_snr: float = 9.0
) -> list[float]:
    """Return the levels, from lambda_0 = max_log_snr down to lambda_steps = min_log_snr.

    alpha_k = sigmoid(min) + (sigmoid(max) - sigmoid(min)) share_k, lambda_k = log(alpha_k / beta_k), with beta_k made
    likewise from the other end, so that neither end loses digits.

    Raises:
        ValueError: a grid other than cosine and linear.
    """
    if grid not in ("cosine", "linear"):
        raise ValueError(f"grid must be cosine or linear, got {grid!r}")
    levels = []
    for k in range(steps + 1):
        t = k / steps
        clean, noise = (
            (1 - t, t) if grid == "linear" else (math.cos(math.pi * t / 2) ** 2, math.sin(math.pi * t / 2) ** 2)
        )
        alpha = _sigmoid(max_log_snr) * clean + _sigmoid(min_log_snr) * noise
        beta = _sigmoid(-max_log_snr) * clean + _sigmoid(-min_log_snr) * noise
        levels.append(min(max(math.log(alpha / beta), min_log_snr), max_log_snr))
    return levels


@dataclass(frozen=True)
class Prediction:
    """The predicted clean distribution of every position.

    `probs` is [B, W, V], float32 or float64, 0 at the mask, each sequence summing to 1.
    """

    probs: Tensor

    @property
    def vocab_size(self) -> int:
        """Number of ids V, mask included."""
        return self.probs.shape[-1]

    def rows(self, where: Positions) -> Tensor:
        """Return the probabilities of some positions, [n, V]."""
        return self.probs[where]


@dataclass(frozen=True)
class LazyPrediction:
    """The same distributions, made from logits where they are asked for: to the same bits as all of them at once.

    Raises:
        ValueError: as for `predict`.
    """

    logits: Tensor
    noise: Noise
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _check_logits(self.logits, self.noise)
        _check_truncation(self.temperature, self.top_k, self.top_p)

    @property
    def vocab_size(self) -> int:
        """Number of ids V, mask included."""
        return self.noise.vocab_size

    def rows(self, where: Positions) -> Tensor:
        """Return the probabilities of some positions, [n, V]."""
        values = self.logits[where][:, : self.noise.vocab_size]  # a copy
        if values.dtype != torch.float64:
            values = values.to(torch.float32)
        return _probabilities(values, self.noise, self.temperature, self.top_k, self.top_p)

    def at(self, ids: Tensor) -> Tensor:
        """Return the probability of the given ids, [B, W]."""
        found = self.logits.new_zeros(ids.shape, dtype=torch.promote_types(self.logits.dtype, torch.float32))
        for where in _position_blocks(torch.ones_like(ids, dtype=torch.bool), self.noise.vocab_size):
            found[where] = _of_ids(self.rows(where), ids[where])
        return found


def predict(
    logits: Tensor, noise: Noise, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Prediction:
    """Return the softmax over the real tokens, tempered, truncated and renormalised.

    Args:
        logits: [B, W, V or more], any float dtype; converted to float32 (float64 stays). Padding columns are dropped.
        noise: defines the mask and V.
        temperature: divides the logits; 0 puts everything on the most probable token (the lowest id among equals).
        top_k: keep the k most probable tokens (and any equal to the last of them).
        top_p: keep the most probable tokens up to and including the one at which their sum reaches p.

    Raises:
        ValueError: a negative temperature, top_k below 1, top_p outside (0, 1], or too few logits.
    """
    _check_truncation(temperature, top_k, top_p)
    _check_logits(logits, noise)
    values = logits[..., : noise.vocab_size]
    values = values.clone() if values.dtype == torch.float64 else values.to(torch.float32, copy=True)
    return Prediction(_probabilities(values, noise, temperature, top_k, top_p))


def _probabilities(values: Tensor, noise: Noise, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return what `predict` does from logits [..., V], which are written over."""
    values[..., noise.mask_id] = -torch.inf
    if temperature == 0:
        best = values.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(values).scatter_(-1, best, 1.0)
    if temperature != 1:
        values /= temperature
    if top_k is not None and top_k < noise.vocab_size - 1:
        values.masked_fill_(values < values.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    probs = values.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        kept = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, kept)
        probs /= _sums(probs)
    return probs


def _sums(probs: Tensor) -> Tensor:
    """Return sums over the vocabulary, [..., 1], that do not depend on the number of positions.

    torch shares the sum of a single position among its threads, which changes the last bit; of two it does not.
    """
    rows = probs.reshape(-1, probs.shape[-1])
    found = (rows.expand(2, -1) if len(rows) == 1 else rows).sum(dim=-1)
    return found[: len(rows)].view(*probs.shape[:-1], 1)


def draw_tokens(prediction: Prediction | LazyPrediction, where: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens for the positions that are true in `where`, by inversion of the cumulative distribution.

    Args:
        prediction: the distributions of all positions.
        where: [B, W] bool, n of them true.
        uniforms: [B, W] numbers on [0, 1), of which those at `where` are used.

    Returns:
        [n] int64 ids of positive probability.
    """
    drawn = torch.zeros_like(where, dtype=torch.int64)
    for some in _position_blocks(where, prediction.vocab_size):
        drawn[some] = _invert(prediction.rows(some), uniforms[some])
    return drawn[where]


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which each cumulative distribution passes its number, [n].

    Sums are in float64: in float32 the last tokens of a vocabulary of 131072 would get too much or too little.
    """
    cumulative = probs.to(torch.float64, copy=True).cumsum_(dim=-1)
    target = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def _of_ids(probs: Tensor, ids: Tensor) -> Tensor:
    return probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _position_blocks(where: Tensor, vocab_size: int) -> Iterator[Positions]:
    """Yield the positions that are true in `where`, a few at a time."""
    sequence, place = where.nonzero(as_tuple=True)
    numbers = _CPU_BLOCK * torch.get_num_threads() if where.device.type == "cpu" else _GPU_BLOCK
    size = max(1, numbers // vocab_size)
    yield from zip(sequence.split(size), place.split(size), strict=True)


def noise_probability(noise: Noise, log_snr: Tensor, ids: Tensor) -> Tensor:
    """pi_lambda at the given ids: 1 - u at the mask, u over the number of real tokens elsewhere."""
    return torch.where(
        ids == noise.mask_id, noise.mask_prob(log_snr), noise.uniform_prob(log_snr) / (noise.vocab_size - 1)
    )


def reverse_kernel(ids: Tensor, at_t: Tensor, at_s: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return alpha_{t|s} and (beta pi)_{t|s}[z_t], the latter at least 0, both [...]."""
    keep = torch.sigmoid(at_t) / torch.sigmoid(at_s)
    at_noisier = torch.sigmoid(-at_t) * noise_probability(noise, at_t, ids)
    fresh = at_noisier - keep * torch.sigmoid(-at_s) * noise_probability(noise, at_s, ids)
    return keep, fresh.clamp(min=0.0)


def reverse_step(
    prediction: Prediction | LazyPrediction,
    ids: Tensor,
    log_snr_t: float,
    log_snr_s: float,
    uniforms: Tensor,
    *,
    process: Noise,
) -> Tensor:
    """Draw z_s ~ p(z_s | z_t) for every token, [B, W], from three uniform numbers per token, [3, B, W].

    With p the prediction and q_s(p) = alpha_s p + beta_s pi_s, Bayes' rule gives a mixture: the token stays with weight
    alpha_{t|s} q_s(p)[z_t] and is redrawn from q_s(p) with weight (beta pi)_{t|s}[z_t]. The first number chooses a
    token, of the vocabulary or of the noise, the second chooses between keeping and redrawing, the third between signal
    and noise. If p makes both weights 0 (a revealed token whose probability truncation set to 0), the token stays: no
    sequence is ever empty.

    The prediction is looked at only where it can change something. A token stays if it would stay at probability 0,
    since a higher one makes staying more likely; a mask has probability 0.
    """
    at_t = torch.full(ids.shape, log_snr_t, dtype=torch.float64, device=ids.device)
    at_s = torch.full(ids.shape, log_snr_s, dtype=torch.float64, device=ids.device)
    keep, fresh = reverse_kernel(ids, at_t, at_s, process)
    alpha_s, beta_s = torch.sigmoid(at_s), torch.sigmoid(-at_s)
    noise_at_s = beta_s * noise_probability(process, at_s, ids)
    is_signal = uniforms[2] < alpha_s
    is_mask = (uniforms[2] - alpha_s) < beta_s * process.mask_prob(at_s)
    count = process.vocab_size - 1
    real = (uniforms[0] * count).long().clamp(max=count - 1)
    real = real + (real >= process.mask_id).long()
    drawn = torch.where(is_mask, process.mask_id, real)
    is_fresh = uniforms[1] * (keep * noise_at_s + fresh) < fresh
    for some in _position_blocks(is_fresh & (is_signal | (ids != process.mask_id)), process.vocab_size):
        probs = prediction.rows(some)
        marginal = alpha_s[some] * _of_ids(probs, ids[some]).double() + noise_at_s[some]
        goes = uniforms[1][some] * (keep[some] * marginal + fresh[some]) < fresh[some]
        is_fresh[some] = goes
        redrawn = goes & is_signal[some]
        drawn[some] = drawn[some].masked_scatter(redrawn, _invert(probs[redrawn], uniforms[0][some][redrawn]))
    return torch.where(is_fresh, drawn, ids)


def adaptive_candidates(
    plain: Prediction | LazyPrediction,
    ids: Tensor,
    log_snr: float,
    *,
    noise: Noise,
    count: int,
    fixed: Tensor | None = None,
) -> Tensor:
    """Return the positions, at most `count` per sequence, that the adaptive sampler rewrites: [B, W] bool.

    score = (max_v p(v) - p(z)) pi(z) with pi the noise's probability of the present token at the current level: under
    masked noise the surest masks, under uniform noise the tokens that the model would most like to replace. Positions
    whose token is already the best one, or cannot be noise, are excluded.

    Args:
        plain: the prediction without temperature or truncation (at temperature 0 every position would look sure).
        ids: [B, W] present tokens.
        log_snr: the current level.
        noise: the noise process.
        count: maximal number of positions per sequence.
        fixed: [B, W] bool, positions never to be rewritten.
    """
    level = torch.tensor(log_snr, dtype=torch.float64, device=ids.device)
    score = noise_probability(noise, level, ids)
    if fixed is not None:
        score = score.masked_fill(fixed, 0.0)
    for some in _position_blocks(score > 0, noise.vocab_size):
        probs = plain.rows(some)
        score[some] *= (probs.max(dim=-1).values - _of_ids(probs, ids[some])).double()
    ranked, order = score.sort(dim=-1, descending=True, stable=True)
    chosen = ranked > 0
    chosen[:, count:] = False
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


class PrefixCache(Protocol):
    """A model whose clean prefix attends only to itself, so that the prefix's keys and values can be cached."""

    def encode_prefix(self, ids: Tensor, previous: Any | None) -> Any:
        """Return keys and values of the clean prefix [B, P].

        Args:
            ids: the prefix.
            previous: the result for a shorter prefix of the same sequences, or None. If a prefix attends causally, only
                the new part needs to be computed; if it attends in both directions, all of it does.
        """
        ...

    def denoise_block(self, ids: Tensor, cache: Any) -> Tensor:
        """Return logits [B, W, V] of the positions [B, W] that follow the prefix."""
        ...


class Step(NamedTuple):
    """State that an observer receives before each step, and with `steps_left` 0 when a block is finished."""

    steps_left: int
    log_snr: float
    ids: Tensor
    """Complete sequences, [B, L]."""
    start: int
    stop: int
    """End of the window being denoised, which begins at `start`."""
    confidence: Callable[[], Tensor]
    """Function that returns the model's probability of the window's tokens, [B, stop - start]; it runs the model, and
    the next step reuses the result.
    """


class Generated(NamedTuple):
    """Finished sequences."""

    sequences: Tensor
    """Prompt, text, and padding after the end token, without masks: [B, P + max_new_tokens]."""
    new_tokens: Tensor
    """Number of tokens after the prompt, up to and including the end token: [B]."""
    forwards: int
    """Number of calls of the model."""

    @property
    def tokens_per_forward(self) -> Tensor:
        """Number of new tokens per call of the model, [B]."""
        return self.new_tokens / max(self.forwards, 1)


@torch.no_grad()
def generate(
    denoise: Denoise,
    prompt: Tensor,
    settings: Settings,
    noise: Noise,
    *,
    seed: int | Sequence[int] = 0,
    sequences: Tensor | None = None,
    prefix_length: int | None = None,
    cache: PrefixCache | None = None,
    streamer: Any = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generated:
    """Generate text after prompts, or in their gaps.

    Every draw is a function of (seed, sequence, step, position): a sequence does not depend on the rest of its batch
    (as far as the model itself does not).

    Args:
        denoise: the model; its only input about the noise is the number of leading clean tokens.
        prompt: [B, P] ids, never changed; -1 marks a position to fill in.
        settings, noise: settings of the sampler, and the noise that the model was trained with.
        seed: one for all sequences or one per sequence.
        sequences: [B] int64 that number the sequences under one seed; default 0..B-1, or 0 for each if each has its own
            seed.
        prefix_length: start of the first block; by default the number of leading given tokens, which must be the same
            in every sequence (a sequence's blocks must not depend on its neighbours: batch prompts by length).
        cache: the model's prefix cache; used for all passes except guidance without the prompt.
        streamer: gets `put(ids)` for the prompt and each finished block, `put_draft(ids)` after each step, `end()`.
        on_step: observer.

    Raises:
        ValueError: arguments that do not fit together.
    """
    walk = _Walk(denoise, prompt, settings, noise, seed, sequences, prefix_length, cache)
    put, put_draft = getattr(streamer, "put", None), getattr(streamer, "put_draft", None)
    if put is not None:
        put(prompt)
    length = walk.ids.shape[1]
    block = settings.block_length or max(1, length - walk.first)
    for start in range(walk.first, length, block):
        stop = min(start + block, length)
        walk.open_block(start, stop)
        for step in walk.steps():
            if on_step is not None:
                on_step(step)
            if put_draft is not None:
                put_draft(step.ids[:, start:stop])
        if put is not None:
            put(walk.ids[:, start:stop].clone())
        if bool(walk.close_block().all()):
            break
    if streamer is not None and hasattr(streamer, "end"):
        streamer.end()
    return walk.result()


class _Walk:
    """State of the sequences between noise and text."""

    def __init__(
        self,
        denoise: Denoise,
        prompt: Tensor,
        settings: Settings,
        noise: Noise,
        seed: int | Sequence[int],
        sequences: Tensor | None,
        prefix_length: int | None,
        cache: PrefixCache | None,
    ) -> None:
        self.denoise, self.settings, self.noise, self.cache = denoise, settings, noise, cache
        count, self.prompt_length = prompt.shape
        numbers = torch.arange(count) if isinstance(seed, int) else torch.zeros(count, dtype=torch.int64)
        self.draws = CounterRNG(seed, numbers if sequences is None else sequences, prompt.device)
        length = self.prompt_length + settings.max_new_tokens
        prior = self.draws.noise(length, settings.min_log_snr, noise)
        given = torch.nn.functional.pad(prompt, (0, settings.max_new_tokens), value=-1)
        self.given = given >= 0
        self.fixed = self.given.clone()
        self.ids = torch.where(self.given, given, prior)
        self.levels = log_snr_steps(
            settings.max_denoising_steps,
            grid=settings.grid,
            min_log_snr=settings.min_log_snr,
            max_log_snr=settings.max_log_snr,
        )
        self.first = _leading(self.given) if prefix_length is None else prefix_length
        self.prefix: Any = None
        self.logits: Tensor | None = None
        self.forwards = 0
        self.finished = torch.zeros(count, dtype=torch.bool, device=prompt.device)
        self.new_tokens = torch.full((count,), settings.max_new_tokens, device=prompt.device)

    def open_block(self, start: int, stop: int) -> None:
        """Set the window; everything before it is clean from here on."""
        self.start, self.stop = start, stop
        self.per_step = self.settings.tokens_per_step or -(-(stop - start) // self.settings.max_denoising_steps)
        self.settings.check_reach(stop - start)
        if self.cache is not None:
            self.prefix = self.cache.encode_prefix(self.ids[:, :start], self.prefix)

    def steps(self) -> Iterator[Step]:
        """Denoise the window; yield the state for observers."""
        self.logits = None
        for k in range(self.settings.max_denoising_steps, 0, -1):
            yield self._seen(k)
            moved = self._moved(self._asked(), k)
            if moved is None:
                break
            is_same = self.settings.reuse_logits and torch.equal(moved, self._window())
            self.ids[:, self.start : self.stop] = moved
            self.logits = self.logits if is_same else None
        self._fill()
        yield self._seen(0)

    def close_block(self) -> Tensor:
        """End sequences whose finished blocks contain an end token after the prompt; return which sequences have ended,
        [B]."""
        if not self.settings.end_ids:
            return self.finished
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_end = self._are_ends(self.ids) & (place >= self.prompt_length) & (place < self.stop)
        ends = is_end.any(dim=1) & ~self.finished
        last = is_end.long().argmax(dim=1)
        self.finished |= ends
        self.new_tokens = torch.where(ends, last - self.prompt_length + 1, self.new_tokens)
        beyond = ends.unsqueeze(1) & (place > last.unsqueeze(1))
        pad = self.settings.end_ids[0] if self.settings.pad_token_id is None else self.settings.pad_token_id
        self.ids = torch.where(beyond, pad, self.ids)
        self.fixed |= beyond
        return self.finished

    def result(self) -> Generated:
        """Return the sequences in their present state."""
        return Generated(self.ids, self.new_tokens, self.forwards)

    def _window(self) -> Tensor:
        return self.ids[:, self.start : self.stop]

    def _moved(self, logits: Tensor, k: int) -> Tensor | None:
        """Return the window after step k, or None if no further step can change anything."""
        window, fixed = self._window(), self.fixed[:, self.start : self.stop]
        uniforms = self.draws.step_uniforms(self.start, self.stop, draw=k)
        if self.settings.sampler == "ancestral":
            drawn = reverse_step(
                self._predict(logits), window, self.levels[k], self.levels[k - 1], uniforms, process=self.noise
            )
            return torch.where(fixed, window, drawn)
        plain = LazyPrediction(logits, self.noise)
        chosen = adaptive_candidates(plain, window, self.levels[k], noise=self.noise, count=self.per_step, fixed=fixed)
        if not bool(chosen.any()):
            return None
        return window.masked_scatter(chosen, draw_tokens(self._predict(logits), chosen, uniforms[0]))

    def _fill(self) -> None:
        """Draw new tokens for what no finished text may contain: masks, and end tokens that come too early."""
        window = self._window()
        left = (window == self.noise.mask_id) | self._too_early(window)
        left &= ~self.fixed[:, self.start : self.stop]
        if bool(left.any()):
            uniforms = self.draws.step_uniforms(self.start, self.stop, draw=0)
            drawn = draw_tokens(self._predict(self._asked()), left, uniforms[0])
            self.ids[:, self.start : self.stop] = window.masked_scatter(left, drawn)
            self.logits = None

    def _too_early(self, window: Tensor) -> Tensor:
        place = torch.arange(self.start, self.stop, device=window.device)
        return self._are_ends(window) & (place < self.prompt_length + self.settings.min_new_tokens)

    def _are_ends(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.settings.end_ids, dtype=ids.dtype, device=ids.device))

    def _predict(self, logits: Tensor) -> LazyPrediction:
        s = self.settings
        return LazyPrediction(logits, self.noise, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    def _asked(self) -> Tensor:
        """Return the logits for the present window."""
        if self.logits is None:
            self.logits = self._logits()
        return self.logits

    def _logits(self) -> Tensor:
        """Return the model's logits for the window, with guidance, and without end tokens that come too early."""
        limit = self.ids.shape[1] if self.settings.see_tail else self.stop
        width, self.forwards = self.stop - self.start, self.forwards + 1
        if self.cache is None:
            logits = self.denoise(self.ids[:, :limit], self.start)[:, self.start : self.stop]
        else:
            logits = self.cache.denoise_block(self.ids[:, self.start : limit], self.prefix)[:, :width]
        if self.settings.guidance_scale != 1.0:
            self.forwards += 1
            blank = self.draws.noise(
                self.ids.shape[1], self.settings.min_log_snr, self.noise, name="sample/unconditional"
            )
            blind = torch.where(self.given, blank, self.ids)[:, :limit]
            without = self.denoise(blind, 0)[:, self.start : self.stop].clamp(min=-1e30)
            logits = without + self.settings.guidance_scale * (logits.clamp(min=-1e30) - without)
        early = self.prompt_length + self.settings.min_new_tokens - self.start
        if self.settings.end_ids and early > 0:
            logits = logits.clone()
            logits[:, :early, list(self.settings.end_ids)] = -torch.inf
        return logits

    def _seen(self, steps_left: int) -> Step:
        def confidence() -> Tensor:
            return LazyPrediction(self._asked(), self.noise).at(self._window())

        return Step(steps_left, self.levels[steps_left], self.ids.clone(), self.start, self.stop, confidence)


def _leading(given: Tensor) -> int:
    """Return the number of leading given tokens, which must be the same in every sequence."""
    counts = given.long().cumprod(dim=1).sum(dim=1)
    if len(counts) and not bool((counts == counts[0]).all()):
        raise ValueError(
            f"the sequences of a batch must start with prompts of one length, got {counts.unique().tolist()}; "
            "batch them by length, or set prefix_length"
        )
    return int(counts[0]) if len(counts) else given.shape[1]


def _check_logits(logits: Tensor, noise: Noise) -> None:
    if logits.shape[-1] < noise.vocab_size:
        raise ValueError(f"expected at least {noise.vocab_size} logits a token, got {logits.shape[-1]}")


def _check_truncation(temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if (
        not 0 <= temperature < math.inf
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise ValueError(
            "temperature must be at least 0, top_k at least 1 and top_p in (0, 1], "
            f"got temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def _unit_interval(words: Sequence[Tensor]) -> Tensor:
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
