"""Text drawn during training: the same on every layout, the checkpoint's own, and no step of the run changed by it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from megadiff.config.load import load_config
from megadiff.errors import ConfigError
from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.sampling.standalone import Settings, generate
from megadiff.sampling.trace import printable
from megadiff.train.hooks.validation import TEXT_SEED
from tests.support.commands import write_yaml
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, read_metrics, toy_config, toy_tree, train_on_rank, wire_on_rank

with quiet():
    from megadiff.parallel.pipeline import DistributedForward
    from megadiff.run.load_model import load_model

STEPS, ROWS, DENOISING = 4, 2, 6
LAYOUTS = {
    "one": (1, {}),
    "tp2_pp2_dp2": (8, {"tensor": 2, "pipeline": 2, "sequence": True, "distributed_optimizer": True}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


def _config(corpus, output, name, **more):
    block = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    return toy_config(
        corpus,
        output,
        name=name,
        **{
            **block,
            "schedule__steps": STEPS,
            "data__valid": [],
            "eval__every": 2,
            "eval__samples": ROWS,
            "eval__sample_steps": DENOISING,
            **more,
        },
    )


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory):
    """`{layout: its description}`, trained; and `plain`, one rank without samples."""
    root = tmp_path_factory.mktemp("drawn")
    configs = {name: _config(toy_corpus, root, name, parallel=parallel) for name, (_, parallel) in LAYOUTS.items()}
    for name, config in configs.items():
        on_ranks(LAYOUTS[name][0], train_on_rank, config, LAYOUTS[name][0], save=name == "one")
    configs["plain"] = _config(toy_corpus, root, "plain", eval__samples=0)
    on_ranks(1, train_on_rank, configs["plain"], 1)
    return configs


def _texts(config):
    return {path.name: path.read_text() for path in sorted((config.folder / "samples").iterdir())}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_is_drawn_with_every_evaluation_alike_on_every_layout(runs, layout):
    found = _texts(runs[layout])
    assert list(found) == [f"step_{step:08d}.txt" for step in (0, 2, 4)]
    assert found == _texts(runs["one"])
    assert len(set(found.values())) == 3
    assert all(text.startswith("[1] ") and "\n\n[2] " in text for text in found.values())


def test_drawing_changes_no_step(runs):
    curves = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(runs[name].folder / "metrics.jsonl")]
        for name in ("one", "plain")
    ]
    assert curves[0] == curves[1]
    assert not (runs["plain"].folder / "samples").exists()


def _drawn_again(folder):
    with load_model(folder, platform="cpu") as trained:
        settings = Settings(max_new_tokens=trained.model.seq_length, max_denoising_steps=DENOISING)
        prompt = torch.empty(ROWS, 0, dtype=torch.int64)
        ids = generate(trained.denoise, prompt, settings, trained.process, seed=TEXT_SEED).sequences
        return [printable(trained.tokenizer.decode(sequence)) for sequence in ids.tolist()]


def test_the_last_text_is_what_the_last_checkpoint_says(runs):
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:  # this process opens no process group
        one, two = pool.submit(_drawn_again, runs["one"].folder).result()
    assert _texts(runs["one"])["step_00000004.txt"] == f"[1] {one}\n\n[2] {two}\n"


def _after_a_prompt(config):
    """Return logits after a prompt of three tokens, as text is drawn and by the model itself in its own attention."""
    run = wire_on_rank(config, 1)
    ids = torch.arange(4, 20).repeat(ROWS, 1)
    method, chunks = run.step.objective.objective, run.step.chunks
    forward = DistributedForward(
        chunks, topology=run.step.topology, device=torch.device("cpu"), shape=(ROWS, 16),
        attention=method.prompted_attention, vocab_size=260,
    )  # fmt: skip
    found = []
    forward.run(lambda ask: found.append(ask(ids, 3)) or ids)
    run.close()
    with torch.no_grad():
        patterns = AttentionPattern.prefix(torch.tensor([3, 3])), AttentionPattern.full(2)
        own, full = (chunks[0](ids, pattern.codes()).transpose(0, 1)[..., :260] for pattern in patterns)
    return torch.equal(found[0], own), torch.equal(own, full)


def test_text_is_drawn_after_a_prompt_as_the_model_was_trained(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path, "prompted", conditioning__prompt=0.5)
    assert on_ranks(1, _after_a_prompt, config)[0] == (True, False)


def test_an_autoregressive_control_is_not_sampled(toy_corpus, tmp_path):
    tree = toy_tree(toy_corpus, tmp_path, method__name="next_token", eval__samples=2)
    path = write_yaml(tmp_path / "ar.yaml", tree)
    with pytest.raises(ConfigError, match=r"eval\.samples is 2, but an autoregressive control .* set eval\.samples to"):
        load_config(path, [], RunConfig)
