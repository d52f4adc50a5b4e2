"""Small real things to test against: a random model, and an SAE that fits it.

Public: whoever writes a policy, a score or an engine can use them too.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from guard.sae.config import SaeConfig
from guard.sae.load import build_sae, save_sae
from guard.sae.model import Sae

__all__ = [
    "TOY_WORDS",
    "make_toy_model",
    "make_toy_sae",
    "save_toy_adapter",
    "save_toy_sae",
]

TOY_WORDS = [*(f"w{i}" for i in range(112)), *'{}[]":,1']
"""Vocabulary of the toy model, besides its special tokens; it can write some JSON."""

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_toy_model(
    folder: Path,
    *,
    num_layers: int = 4,
    d_model: int = 64,
    max_length: int = 2048,
    seed: int = 0,
) -> None:
    """Write a random Llama with a word tokenizer, as a Hugging Face folder.

    Args:
        folder: Where it goes.
        num_layers: Decoder layers.
        d_model: Hidden size; heads have 32 dimensions.
        max_length: Longest context, in tokens.
        seed: Of the weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *TOY_WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.chat_template = _CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=d_model,
            intermediate_size=2 * d_model,
            num_hidden_layers=num_layers,
            num_attention_heads=d_model // 32,
            num_key_value_heads=d_model // 32,
            max_position_embeddings=max_length,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def save_toy_adapter(
    folder: Path,
    *,
    num_layers: int = 4,
    d_model: int = 64,
    rank: int = 8,
    scale: float = 0.3,
    seed: int = 0,
) -> None:
    """Write a random LoRA adapter for the toy model, as a PEFT folder.

    Args:
        folder: Where it goes.
        num_layers: Decoder layers of the model.
        d_model: Its hidden size.
        rank: Of the adapter's update to each query and output projection.
        scale: Standard deviation of its weights; an adapter of 0 changes nothing.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    projections = ["q_proj", "o_proj"]
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{half}.weight": (
            scale * torch.randn(*shape, generator=generator)
        )
        for layer in range(num_layers)
        for name in projections
        for half, shape in (("A", (rank, d_model)), ("B", (d_model, rank)))
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": projections,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def toy_sae_parts(
    *,
    d_model: int = 64,
    d_sae: int = 96,
    architecture: str = "jumprelu",
    hook_point: str = "layers.1.resid_post",
    seed: int = 0,
) -> tuple[SaeConfig, dict[str, Tensor]]:
    """Return configuration and tensors of a random SAE with active latents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = torch.nn.functional.normalize(draw(d_sae, d_model), dim=1)
    tensors = {
        "W_enc": directions.T.contiguous(),
        "b_enc": 0.1 * draw(d_sae),
        "W_dec": directions,
        "b_dec": 0.1 * draw(d_model),
        "latent_max": 1.0 + draw(d_sae).abs(),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = 0.2 * draw(d_sae).abs()
    config = SaeConfig(
        architecture=architecture,  # type: ignore[arg-type]
        d_model=d_model,
        d_sae=d_sae,
        k=8 if architecture == "topk" else None,
        hook_point=hook_point,
    )
    return config, tensors


def make_toy_sae(**options: object) -> Sae:
    """Return a random SAE; options as for `toy_sae_parts`."""
    return build_sae(*toy_sae_parts(**options))  # type: ignore[arg-type]


def save_toy_sae(folder: Path, **options: object) -> None:
    """Write a random SAE in the project's own format."""
    save_sae(folder, *toy_sae_parts(**options))  # type: ignore[arg-type]
