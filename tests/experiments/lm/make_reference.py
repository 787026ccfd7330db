"""Writes reference/: small random models of Transformers, with their logits.

Run with PyTorch and Transformers (2.13 and 5.23 wrote what is there):

    python tests/experiments/lm/make_reference.py
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "reference"

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

# Between them: tied and not, keys for every query and shared ones, heads narrower
# and wider than their share, one file and several.
MODELS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3": (
        "LlamaConfig",
        {"rope_parameters": LLAMA_3, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "qwen-2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen-3": (
        "Qwen3Config",
        {"head_dim": 6, "rope_parameters": {**PLAIN, "rope_theta": 1_000_000.0}},
    ),
}


def main():
    # Here, since pytest imports every file of the tests, and they run without.
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))
    for index, (name, (kind, changed)) in enumerate(MODELS.items()):
        settings = SIZES | {"rope_parameters": dict(PLAIN)} | changed
        config = getattr(transformers, kind)(**settings)
        torch.manual_seed(index)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases too; wide enough that attention is not uniform.
                parameter.add_(0.3 * torch.randn_like(parameter))
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        shards = {"max_shard_size": "8KB"} if name == "qwen-3" else {}
        model.save_pretrained(FOLDER / name, **shards)
        (FOLDER / name / "generation_config.json").unlink()
        np.savez(FOLDER / name / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
