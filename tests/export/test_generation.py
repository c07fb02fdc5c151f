"""`generate` and the outputs of an exported model, called as people call the models of transformers."""

from __future__ import annotations

import pytest
import torch

from megadiff.export.export import export

P, NEW, STEPS = 4, 8, 6
PROMPT = torch.tensor([[0, 9, 10, 11]])
FAST = {"max_new_tokens": NEW, "max_denoising_steps": STEPS}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return export(checkpoints["tp1"], tmp_path_factory.mktemp("hf") / "toy").folder


@pytest.fixture(scope="module")
def model(transformers, folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return loaded.eval()


def cut_by_hand(text, ends, pad):
    """A text without ends, ended at the first new token that is one."""
    text = text.clone()
    for place in range(P, len(text)):
        if int(text[place]) in ends:
            text[place + 1 :] = pad
            break
    return text


@pytest.mark.parametrize("as_what", [list, tuple, torch.tensor])
def test_any_of_several_ends_ends_a_text(model, as_what):
    endless = model.generate(PROMPT, eos_token_id=[], seed=[3], **FAST)[0]
    new = endless[P:].tolist()
    ends = [new[5], new[2], 259]
    found = model.generate(PROMPT, eos_token_id=as_what(ends), pad_token_id=7, seed=[3], **FAST)[0]
    assert torch.equal(found, cut_by_hand(endless, ends, 7))
    assert (found == 7).any()
    one = model.generate(PROMPT, eos_token_id=new[2], pad_token_id=7, seed=[3], **FAST)[0]
    assert torch.equal(one, cut_by_hand(endless, [new[2]], 7))


def test_none_of_several_ends_comes_too_early(model):
    ends = list(range(4, 200))
    found = model.generate(PROMPT, eos_token_id=ends, min_new_tokens=5, seed=[3], **FAST)[0, P : P + 5]
    assert not set(found.tolist()) & set(ends)


def test_several_texts_of_a_prompt_begin_with_the_one_it_has_alone(model):
    prompts = torch.cat([PROMPT, PROMPT + 20])
    alone = model.generate(prompts, seed=5, **FAST)
    found = model.generate(prompts, seed=5, num_return_sequences=3, **FAST)
    assert found.shape == (6, P + NEW)
    assert torch.equal(found[::3], alone)
    assert len({tuple(text.tolist()) for text in found[:3]}) == 3
    again = model.generate(prompts[1:], seed=[8], num_return_sequences=2, **FAST)
    assert torch.equal(again[:1], model.generate(prompts[1:], seed=[8], **FAST))
    named = model.generate(PROMPT, seed=[8, 9], num_return_sequences=2, **FAST)
    assert torch.equal(named[1:], model.generate(PROMPT, seed=[9], **FAST))


def test_padded_prompts_give_the_texts_they_have_alone(model):
    texts = [[0, 9, 10, 11], [12], [13, 14, 15, 16], [17, 18]]
    padded = torch.tensor([[2] * (P - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (P - len(text)) + [1] * len(text) for text in texts])
    options = {"block_length": 4, "eos_token_id": [], **FAST}
    found = model.generate(padded, attention_mask=mask, seed=[4, 5, 6, 7], return_dict_in_generate=True, **options)
    for sequence, text in enumerate(texts):
        alone = model.generate(torch.tensor([text]), seed=[4 + sequence], return_dict_in_generate=True, **options)
        assert torch.equal(found.sequences[sequence, P - len(text) :], alone.sequences[0])
        if len(text) < P:  # the others are written together, as long as either changes
            assert found.tokens_per_forward[sequence] == alone.tokens_per_forward[0]
    assert torch.equal(found.sequences[:, :P], padded)
    by_number = model.generate(padded, attention_mask=mask, seed=1, **options)
    assert torch.equal(by_number[2], model.generate(padded[[0, 0, 2]], seed=1, **options)[2])


def test_a_tokenizers_batch_goes_in_as_it_comes(transformers, model, folder):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    batch = tokenizer(["ab", "abcd"], return_tensors="pt", padding=True, return_token_type_ids=True)
    assert model.generate(**batch, **FAST).shape == (2, 4 + NEW)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe("ab", num_return_sequences=2, **FAST)
    assert [part["generated_text"][:2] for part in found] == ["ab", "ab"]


def test_a_generation_config_is_followed_and_the_call_wins(transformers, model):
    config = transformers.GenerationConfig(max_new_tokens=5, temperature=0.5, do_sample=True, top_k=3)
    found = model.generate(PROMPT, generation_config=config, max_denoising_steps=STEPS, seed=[1])
    same = {"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "max_denoising_steps": STEPS, "seed": [1]}
    assert torch.equal(found, model.generate(PROMPT, **same))
    assert model.generate(PROMPT, generation_config=config, max_length=3, steps=2).shape == (1, P + 3)
    both = transformers.GenerationConfig(max_new_tokens=5, max_length=100)
    assert model.generate(PROMPT, generation_config=both, steps=2).shape == (1, P + 5)
    several = transformers.GenerationConfig(max_new_tokens=5, num_return_sequences=2, do_sample=True)
    several.return_dict_in_generate = True
    assert model.generate(PROMPT, generation_config=several, steps=2).sequences.shape == (2, P + 5)
    found = model.generate(
        PROMPT, generation_config=several, steps=2, num_return_sequences=3, return_dict_in_generate=False
    )
    assert found.shape == (3, P + 5)
    greedy = transformers.GenerationConfig(max_new_tokens=5, do_sample=False)
    found = model.generate(PROMPT, generation_config=greedy, max_denoising_steps=STEPS, seed=[1])
    same |= {"temperature": 0, "top_k": None}
    assert torch.equal(found, model.generate(PROMPT, **same))


OFF = {
    "num_beams": 1,
    "output_scores": False,
    "repetition_penalty": 1.0,
    "stopping_criteria": [],
    "logits_processor": None,
    "synced_gpus": False,
    "no_repeat_ngram_size": 0,
}


def test_options_that_are_off_change_nothing(model):
    assert torch.equal(model.generate(PROMPT, seed=[1], **OFF, **FAST), model.generate(PROMPT, seed=[1], **FAST))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"output_scores": True},
        {"output_logits": True},
        {"stopping_criteria": [lambda ids, scores: True]},
        {"stop_strings": "x"},
        {"max_time": 1.0},
        {"repetition_penalty": 1.2},
        {"logits_processor": [lambda ids, scores: scores]},
        {"bad_words_ids": [[5]]},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_what_blocks_cannot_follow_is_refused_with_what_is_known(transformers, model, options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=rf"^{name}=.* is not supported.*; the settings are max_new_tokens, .*sampler"):
        model.generate(PROMPT, **options, **FAST)
    if hasattr(transformers.GenerationConfig(), name):
        with pytest.raises(TypeError, match=rf"^{name}=.* is not supported"):
            model.generate(PROMPT, generation_config=transformers.GenerationConfig(**options), **FAST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokns": 3}, "unknown setting 'max_new_tokns'; the settings are max_new_tokens, "),
        ({"max_length": 3, "max_new_tokens": 4}, "max_new_tokens is given twice, as 3 and 4"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, got '5'"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"eos_token_id": 260}, "eos_token_id is 260, wanted an id from 0 to 259"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be a whole number, got 'x'"),
        ({"pad_token_id": -5}, "pad_token_id is -5, wanted an id from 0 to 259"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1, got 0"),
        ({"seed": [1, 2, 3]}, "wanted one seed or one for each of 1 prompts, got 3"),
        ({"input_ids": PROMPT[0]}, r"input_ids must be ids \[batch, length\], got torch.int64 of shape \[4\]"),
        ({"input_ids": PROMPT.float()}, r"input_ids must be ids \[batch, length\], got torch.float32"),
        ({"input_ids": PROMPT + 300}, "input_ids go from 300 to 311, wanted ids from 0 to 259"),
        ({"inputs": PROMPT}, "give input_ids or inputs, which mean the same, not both"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "only where prompts are padded on the left"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \[1, 3\], input_ids \[1, 4\]"),
        ({"max_new_tokens": 13}, "prompt and new tokens are 17 tokens, the model was trained on sequences of 16"),
    ],
)
def test_what_cannot_be_is_one_sentence(model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        model.generate(**{"input_ids": PROMPT, **arguments})
    assert "\n" not in str(caught.value)


def test_outputs_have_the_names_of_transformers(model):
    with torch.no_grad():
        out = model(PROMPT)
        assert out.loss is None
        assert out.hidden_states is None
        assert out.attentions is None
        assert out["logits"] is out[0] is out.logits
        assert "loss" not in out
        assert torch.equal(model(PROMPT, return_dict=False)[0], out.logits)
        assert torch.equal(model.model(PROMPT, return_dict=False)[0], model.model(PROMPT).last_hidden_state)


def test_hidden_states_are_the_blocks_inputs_and_the_last_norms_output(model):
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in model.model.layers]
    with torch.no_grad():
        out = model(PROMPT, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == len(seen) + 1 == 5
    assert all(torch.equal(one, other) for one, other in zip(out.hidden_states, seen, strict=False))
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(PROMPT))
    last = out.hidden_states[-1].detach().double() * model.config.head_scaling
    torch.testing.assert_close(out.logits.double(), last @ model.lm_head.weight.detach().double().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": PROMPT}, "no loss is computed here: the bound needs each token's noise level; train with megadiff"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_in_a_sentence(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(PROMPT, **options)
