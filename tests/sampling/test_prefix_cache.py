"""Blocks with cached keys and values of the clean prefix: the same tokens, and less work."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from megadiff.diffusion.mixing import HybridMixing
from megadiff.sampling.standalone import Settings, generate

VOCAB, MASK, HEADS, WIDTH, LAYERS = 40, 3, 4, 64, 3
NOISES = {"masked": -1000.0, "hybrid": 0.0, "uniform": 1000.0}
Cache = list[tuple[Tensor, Tensor]]


class PromptTransformer(torch.nn.Module):
    """A small Transformer with the trained models' mask: the clean prefix sees itself alone, noise sees everything.

    Args:
        is_causal: the prefix's tokens see those before them only; else all of the prefix.
    """

    def __init__(self, *, is_causal: bool, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def matrix(sequences: int, columns: int) -> Tensor:
            return torch.randn(sequences, columns, generator=draw, dtype=torch.float64) / sequences**0.5

        self.is_causal, self.width, self.positions_done = is_causal, width, 0
        self.embed, self.head = matrix(VOCAB, width) * VOCAB**0.5, matrix(width, VOCAB)
        self.place = matrix(2048, width) * 20
        self.qkv = [matrix(width, 3 * width) for _ in range(LAYERS)]
        self.up = [matrix(width, 2 * width) for _ in range(LAYERS)]
        self.down = [matrix(2 * width, width) for _ in range(LAYERS)]

    def run(self, ids: Tensor, start: int, prefix: int, past: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of ids at positions `start`.., of which those before `prefix` are clean; and all keys and values."""
        self.positions_done += ids.numel()
        x = self.embed[ids] + self.place[start : start + ids.shape[1]]
        query = torch.arange(start, start + ids.shape[1])[:, None]
        key = torch.arange(start + ids.shape[1])[None]
        sees = (query >= prefix) | ((key <= query) if self.is_causal else (key < prefix))
        made: Cache = []
        for layer in range(LAYERS):
            q, k, v = (x @ self.qkv[layer]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            if past is not None:
                k, v = torch.cat([past[layer][0], k], dim=2), torch.cat([past[layer][1], v], dim=2)
            made.append((k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
            x = x + out.transpose(1, 2).flatten(2)
            x = x + torch.relu(x @ self.up[layer]) @ self.down[layer]
            x = x / x.square().mean(-1, keepdim=True).sqrt()
        return x @ self.head, made

    def denoise(self, ids: Tensor, prefix_length: int) -> Tensor:
        return self.run(ids, 0, prefix_length, None)[0]

    def encode_prefix(self, ids: Tensor, previous: Cache | None) -> Cache:
        known = previous[0][0].shape[2] if previous and self.is_causal else 0
        kept = previous if known else None
        return self.run(ids[:, known:], known, ids.shape[1], kept)[1]

    def denoise_block(self, ids: Tensor, cache: Cache) -> Tensor:
        start = cache[0][0].shape[2]
        return self.run(ids, start, start, cache)[0]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "block"])
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
@pytest.mark.parametrize("see_tail", [True, False], ids=["tail", "no tail"])
def test_cached_blocks_equal_uncached_ones_token_for_token(is_causal, name, sampler, see_tail):
    model, process = PromptTransformer(is_causal=is_causal), HybridMixing(VOCAB, MASK, NOISES[name])
    prompt = torch.randint(4, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    settings = Settings(
        max_new_tokens=16, block_length=4, max_denoising_steps=5, sampler=sampler, see_tail=see_tail, eos_token_id=1
    )
    plain = generate(model.denoise, prompt, settings, process, seed=2)
    cached = generate(model.denoise, prompt, settings, process, seed=2, cache=model)
    assert torch.equal(plain.sequences, cached.sequences)
    assert plain.forwards == cached.forwards
    assert len(plain.sequences[:, 5:].unique()) > 6


def test_a_model_whose_prefix_sees_the_noise_would_not_pass():
    """The control: with attention both ways over everything, kept keys and values are not what they would be."""
    model, process = PromptTransformer(is_causal=False), HybridMixing(VOCAB, MASK, 0.0)
    prompt = torch.randint(4, VOCAB, (8, 5), generator=torch.Generator().manual_seed(1))
    settings = Settings(max_new_tokens=16, block_length=4, max_denoising_steps=5)
    both_ways = generate(lambda ids, _: model.denoise(ids, 0), prompt, settings, process, seed=2)
    cached = generate(model.denoise, prompt, settings, process, seed=2, cache=model)
    assert not torch.equal(both_ways.sequences, cached.sequences)


def test_four_cached_blocks_take_less_work_and_less_time():
    """A prompt of 64 tokens and four blocks of 64: known work, and so less time."""
    model, process = PromptTransformer(is_causal=True, width=128), HybridMixing(VOCAB, MASK, 1000.0)
    prompt = torch.randint(4, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    settings = Settings(max_new_tokens=256, block_length=64, max_denoising_steps=12, see_tail=False, reuse_logits=False)
    taken, work, texts = {}, {}, {}
    for name, cache in (("plain", None), ("cached", model)):
        model.positions_done, begin = 0, time.process_time()
        texts[name] = generate(model.denoise, prompt, settings, process, cache=cache).sequences
        taken[name], work[name] = time.process_time() - begin, model.positions_done
    assert torch.equal(texts["plain"], texts["cached"])
    assert work["plain"] == 2 * 12 * (128 + 192 + 256 + 320)
    assert work["cached"] == 2 * (12 * 4 * 64 + 256)
    ratio = taken["plain"] / taken["cached"]
    print(f"four blocks: {work['plain'] / work['cached']:.2f} times fewer positions, {ratio:.2f} times less CPU time")
    assert ratio > 1.5, taken
