"""An lm-eval backend that computes each shared prefix once and logits only where they are read.

Requests are sorted, so neighbours share prefixes; a row holds a tree of tokens (a question once, its choices as
branches), and one forward pass with the tree's ancestor mask scores every branch. Scores are lm-eval's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM

from tasks.models.parallel import map_parallel

Request = tuple[Any, list[int], list[int]]
# Longer rows waste attention on other items' tokens on a CPU; a GPU is kept busy by long ones.
ROW_TOKENS = {"cpu": 384, "cuda": 8192}


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """HFLM on a live model with `_loglikelihood_tokens` replaced; generation stays lm-eval's.

    `on_progress(done, total)` counts the requests of one kind."""

    def __init__(
        self, model: Any, tokenizer: Any, row_tokens: int | None, on_progress: Callable[[int, int], None]
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8)
        if virtual := getattr(model, "virtual_tokens", 0):  # they take up context that texts cannot have
            self._max_length = self.max_length - virtual
        self.row_tokens = row_tokens or ROW_TOKENS.get(str(self.device).partition(":")[0], 1024)
        self.on_progress = on_progress

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood, all windows of all texts packed together."""
        windows: list[Request] = []
        owner = []
        for i, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            if tokens[:1] == [self.prefix_token_id]:  # Llama's tokenizer adds it, and the first window does again
                tokens = tokens[1:]
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=tokens,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_likelihood
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of every request's continuation."""
        # The last token is never an input; a context longer than the model loses its beginning, as in HFLM.
        inputs = [(context + continuation)[:-1][-self.max_length :] for _, context, continuation in requests]
        rows: list[TokenTree] = []
        for i in sorted(range(len(requests)), key=lambda i: inputs[i]):
            # A single request may be longer than a row; what shares its prefix still joins it.
            limit = max(self.row_tokens, 2 * len(inputs[i]))
            if not rows or len(rows[-1].tokens) + rows[-1].count_new(inputs[i]) > limit:
                rows.append(TokenTree())
            rows[-1].add(i, inputs[i])
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for scored in map_parallel(lambda row: self._score_row(row, requests), rows):
            for i, result in scored:
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
            done += len(scored)
            self.on_progress(done, len(requests))
        return results

    @torch.inference_mode()
    def _score_row(self, row: "TokenTree", requests: list[Request]) -> list[tuple[int, tuple[float, bool]]]:
        """Return (request's index, its result) of every request in the row."""
        read = sorted({node for i, path in row.paths for node in path[-len(requests[i][2]) :]})
        column = {node: j for j, node in enumerate(read)}
        mask = row.mask().to(self.device)
        if self.model.config._attn_implementation == "eager":  # it adds the mask: True would add 1, and hide nothing
            hidden = torch.finfo(self.model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~mask, hidden)
        logits = self.model(
            input_ids=torch.tensor([row.tokens], device=self.device),
            position_ids=torch.tensor([row.depths], device=self.device),
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=torch.tensor(read, device=self.device),
        ).logits[0]
        # float32 whatever the model's precision: a bfloat16 sum flips answers by itself.
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        greedy = log_probabilities.argmax(dim=-1).tolist()
        scored = []
        for i, path in row.paths:
            continuation = requests[i][2]
            columns = [column[node] for node in path[-len(continuation) :]]
            total = log_probabilities[columns, continuation].sum().item()
            scored.append((i, (total, [greedy[c] for c in columns] == continuation)))
        return scored


class TokenTree:
    """Sequences as a tree of tokens, in the order of a sorted list: a node is computed once for all that share it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self.paths: list[tuple[int, list[int]]] = []
        """(caller's index, the nodes of that sequence from the root)"""
        self._last: list[int] = []

    def _shared(self, sequence: list[int]) -> int:
        n = 0
        while n < min(len(sequence), len(self._last)) and sequence[n] == self.tokens[self._last[n]]:
            n += 1
        return n

    def count_new(self, sequence: list[int]) -> int:
        """Return how many nodes `add` would make."""
        return len(sequence) - self._shared(sequence)

    def add(self, index: int, sequence: list[int]) -> None:
        path = self._last[: self._shared(sequence)]
        for depth in range(len(path), len(sequence)):
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(sequence[depth])
            self.depths.append(depth)
        self._last = path
        self.paths.append((index, path))

    def mask(self) -> torch.Tensor:
        """Return the attention mask of shape (1, 1, nodes, nodes): a node sees itself and its ancestors."""
        n = len(self.tokens)
        mask = torch.zeros((n, n), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask[None, None]
