"""Tiny language models and batches: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # the defaults are beyond the vocabulary


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    """GPT-2: Conv1D, tied embeddings, learned positions."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, **NO_TOKENS, **settings)
    )


def llama(**settings: Any) -> LlamaForCausalLM:
    """Llama: linear layers, an untied head, RMSNorm."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **NO_TOKENS, **settings)
    )


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable product of rank 4."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def llama_with_lora() -> LlamaForCausalLM:
    """Llama, frozen, with adapters of the attention's queries and values."""
    model = llama().requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRALinear(getattr(layer.self_attn, name)))
    return model


def batch(lengths: tuple[int, ...], seed: int = 1, *, left: bool = False) -> dict[str, Tensor]:
    """Return random token ids (N, 12) with an attention mask of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), 12), generator=generator)
    attended = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": attended.flip(1) if left else attended}


def sets() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return a forget set of two batches and a retain set of three."""
    forget = [batch((12, 7, 4), seed=1), batch((9, 3), seed=2)]
    return forget, [batch((12, 12, 8, 5), seed=seed) for seed in (3, 4, 5)]
