"""The toys are what they say, so that tests against them mean something."""

from pathlib import Path

import pytest
import torch

from guard.sae.load import load_sae
from guard.testing import TOY_WORDS, make_toy_model, make_toy_sae, save_toy_sae


def test_the_toy_model_is_a_folder_that_transformers_can_talk_to(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_toy_model(tmp_path, num_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokenizer(" ".join(TOY_WORDS), return_tensors="pt").input_ids
    assert prompt[0, 0] == tokenizer.bos_token_id
    assert len(set(prompt[0].tolist())) == len(TOY_WORDS) + 1
    output = model(prompt, output_hidden_states=True)
    assert len(output.hidden_states) == 2 + 1
    assert output.hidden_states[1].shape[2] == 64
    # It has opinions: a change of the stream must be able to change a token.
    assert len(output.logits[0].argmax(1).unique()) > 10


def test_the_toy_model_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_toy_model(tmp_path / name, num_layers=1, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_the_toy_sae_is_active_and_loads_as_it_was_saved(
    tmp_path: Path, architecture: str
) -> None:
    sae = make_toy_sae(architecture=architecture)
    save_toy_sae(tmp_path, architecture=architecture)
    loaded = load_sae(tmp_path, format="guard")
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    encoded = sae.encode(rows)
    assert torch.equal(loaded.encode(rows).latents, encoded.latents)
    share = (encoded.latents > 0).float().mean()
    assert 0.05 < share < 0.7
    assert loaded.latent_max is not None
