"""Draw text from an exported model with transformers alone: `python examples/sample_exported.py runs/demo-hf`.

Nothing of megadiff is imported: the folder brings its own code, which is why `trust_remote_code` has to be given.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    """Load the folder, write a few continuations of a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported folder")
    parser.add_argument("--prompt", default="A list is", help="what the text begins with")
    parser.add_argument("--num-tokens", type=int, default=48, help="tokens to write (default 48)")
    parser.add_argument("--steps", type=int, default=48, help="denoising steps (default 48)")
    parser.add_argument("--count", type=int, default=3, help="texts, with seeds 0, 1, ... (default 3)")
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True).eval()
    prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    for seed in range(arguments.count):
        found = model.generate(
            prompt, max_new_tokens=arguments.num_tokens, max_denoising_steps=arguments.steps, seed=seed
        )
        sequences = found if hasattr(found, "shape") else found.sequences
        print(f"[{seed}] {tokenizer.decode(sequences[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
