"""Prefix and prompt tuning: a model that reads trained virtual tokens before every text.

Both are keys and values that each text sees as if they went before it, so here both are a cache that starts full.
PEFT's own forward (0.21) does not fit packed rows: it lets the examples see each other, and drops a prompt's positions.
"""

from typing import Any

import torch
from peft import PeftModelForCausalLM

from tasks.core.errors import ConfigError

ATTENTIONS = ("sdpa", "eager")  # those that read a mask of which place sees which


class VirtualTokens(PeftModelForCausalLM):  # type: ignore[misc]
    """PEFT's model, to be called as its base is: with packed rows, trees of tokens under a mask, or padded batches."""

    @property
    def virtual_tokens(self) -> int:
        return int(self.active_peft_config.num_virtual_tokens)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        starts: list[int] | None = None,
        use_cache: bool = False,
        **options: Any,
    ) -> Any:
        """Return the base's output for `input_ids` (rows, tokens) alone: virtual tokens have no logits.

        Places whose positions do not follow on another are different texts, which do not see each other; `starts[0]`
        first places are seen by all (a Pack's shared prefix). `attention_mask` has shape (rows, tokens), or says which
        place sees which in shape (rows, 1, tokens, tokens)."""
        base: Any = self.base_model
        attention = base.config._attn_implementation
        if attention not in ATTENTIONS or (self.training and base.is_gradient_checkpointing):
            raise ConfigError(
                f"Prefix and prompt tuning need attention with a mask (one of {', '.join(ATTENTIONS)}; found "
                f"{attention}) and no activation checkpointing. Set train.activation_checkpointing=off, and a smaller "
                "train.pack_tokens where memory is short."
            )
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            else:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        sees = attention_mask
        if sees is None or sees.ndim == 2:
            steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
            text = (steps != 1).cumsum(-1)
            sees = text[:, :, None] == text[:, None, :]
            sees[:, :, : starts[0] if starts else 0] = True
            sees = sees.tril()
            if attention_mask is not None:
                sees = sees & attention_mask[:, None, :].bool()
            sees = sees[:, None]
        if sees.dtype == torch.bool and attention == "eager":  # it adds the mask: True would add 1, and hide nothing
            hidden = torch.finfo(base.dtype).min
            sees = torch.zeros(sees.shape, dtype=base.dtype, device=sees.device).masked_fill_(~sees, hidden)
        seen = torch.full(
            (*sees.shape[:-1], self.virtual_tokens), sees.dtype == torch.bool, dtype=sees.dtype, device=sees.device
        )
        return base(
            input_ids=input_ids,
            attention_mask=torch.cat([seen, sees], -1),
            position_ids=position_ids + self.virtual_tokens,
            past_key_values=self._fill_cache(len(input_ids)),
            use_cache=False,
            **options,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stopping_criteria: Any = (),
        max_length: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what transformers' generate returns: `input_ids`, padded on the left, and their continuations."""
        virtual = self.virtual_tokens
        # What stands for the virtual tokens is never read; a token of the text's own changes no penalty on repeats.
        ids = torch.cat([input_ids[:, -1:].expand(-1, virtual), input_ids], 1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        limits = {} if max_length is None else {"max_length": max_length + virtual}

        def behind(criterion: Any) -> Any:
            return lambda found, scores, **more: criterion(found[:, virtual:], scores, **more)

        base: Any = self.base_model
        made: torch.Tensor = base.generate(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(len(ids), virtual), mask], 1),
            past_key_values=self._fill_cache(len(ids)),
            stopping_criteria=[behind(criterion) for criterion in stopping_criteria],
            **limits,
            **options,
        )
        return made[:, virtual:]

    def _fill_cache(self, rows: int) -> Any:
        """Return a cache that holds the virtual tokens' keys and values, with their gradients."""
        prompt = self.get_prompt(rows)
        if not isinstance(prompt, torch.Tensor):
            return prompt
        base: Any = self.base_model
        return base(inputs_embeds=prompt.to(base.dtype), use_cache=True, logits_to_keep=1).past_key_values
