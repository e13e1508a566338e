"""An lm-eval backend that scores a GGUF file in llama.cpp: what ships is scored as it will be run.

Requests are sorted, and what one shares with the request before it stays in the cache; logits are computed only where
they are read. Its scores are compared with those of another file alone, never with those of transformers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from tasks.core.errors import ConfigError
from tasks.evaluation.prefix_lm import check_greedy
from tasks.evaluation.responses import Begun, is_finite
from tasks.evaluation.tree import find_needed
from tasks.models.llama import LlamaReader, find_kept

Request = tuple[Any, list[int], list[int]]
Prompt = tuple[list[int], int]
"""Tokens, and the first place among them that is read."""
LONGEST, MAX_NEW_TOKENS = 4096, 256  # tokens of a context, and of an answer


class GgufLM(TemplateLM):  # type: ignore[misc]
    """A file, and the tokenizer that it was made from: the file's token ids are the same, as its proof shows. Contexts
    are as long as the model's `max_tokens`, at most LONGEST. `on_progress(done, total)` counts the requests of a kind.

    Raises ModelError where llama.cpp cannot load the file."""

    def __init__(
        self, file: Path, tokenizer: Any, max_tokens: int, threads: int, on_progress: Callable[[int, int], None]
    ) -> None:
        super().__init__()
        self.tokenizer, self.on_progress = tokenizer, on_progress
        self.max_length = min(max_tokens, LONGEST)
        self.reader = LlamaReader(file, self.max_length, threads)
        self.unfinished: set[str] | None = set()
        self.begun = Begun()

    def close(self) -> None:
        self.reader.close()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood, nats."""
        windows = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of every request's continuation."""
        results = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for i, result in zip(order, self._score([requests[i][1:] for i in order]), strict=True):
            results[i] = result
        return results

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the scores of contexts' continuations, one after the other."""
        cut = [((context + continuation)[:-1][-self.max_length :], continuation) for context, continuation in pairs]
        prompts = [(tokens, len(tokens) - len(continuation)) for tokens, continuation in cut]

        def answer(i: int) -> list[Any]:
            (tokens, first), continuation = prompts[i], cut[i][1]
            total, greedy = 0.0, True
            for place, logits in self.reader.read(tokens, first):
                token = continuation[place - first]
                best = float(logits.max())
                total += float(logits[token]) - best - float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
                greedy &= bool(logits[token] == best)
            return [total, greedy, []]

        return [(total, greedy) for total, greedy, _ in self._answer_all(prompts, answer)]

    def _answer_all(self, prompts: Sequence[Prompt], answer: Callable[[int], list[Any]]) -> list[list[Any]]:
        """Return `answer` of each prompt's number, in order; the last of it are the tokens that were read after the
        prompt. The first answers that an earlier process gave are not computed again, but for those whose cache a later
        prompt goes on from."""
        known = self.begun.known
        count = next((i for i in range(len(prompts)) if i not in known), len(prompts))
        past: list[int] = []
        branch, chain = None, []
        for i, (tokens, first) in enumerate(prompts[: count + 1]):
            chain.append((find_kept(past, branch, tokens, first)[0], i < count))
            more = known[i][-1] if i < count else []
            past, branch = tokens + more, len(tokens + more) - 1 if more else first
        needed = find_needed(chain)
        results = []
        self.reader.forget()
        for i, (tokens, first) in enumerate(prompts):
            if i < count and not needed[i]:
                found = known[i]
                self.reader.skip(tokens, first)
                if found[-1]:
                    self.reader.skip(tokens + found[-1], len(tokens + found[-1]) - 1)
            else:
                found = answer(i)
                if is_finite(found):
                    self.begun.keep({i: found})
            results.append(found)
            self.on_progress(i + 1, len(prompts))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what greedy decoding gives for every request, up to its stop sequences."""
        eos = self.tokenizer.decode([self.eot_token_id])
        order = sorted(range(len(requests)), key=lambda i: str(requests[i].args[0]))
        prompts: list[Prompt] = []
        limits: list[tuple[list[str], int]] = []
        for i in order:
            options = normalize_gen_kwargs(requests[i].args[1], MAX_NEW_TOKENS)
            stops = [s for s in handle_stop_sequences(options.pop("until", None), eos=eos) if s]
            most = int(options.pop("max_gen_toks"))
            if check_greedy(options, 1.0) != 1.0:
                raise ConfigError("A task penalises repetition, which eval.on_gguf does not: remove one of them.")
            tokens = self.tok_encode(requests[i].args[0])[-(self.max_length - most) :]
            prompts.append((tokens, len(tokens) - 1))
            limits.append((stops, most))

        def answer(number: int) -> list[Any]:
            (tokens, _), (stops, most) = prompts[number], limits[number]
            written: list[int] = []
            is_cut = True
            while is_cut and len(written) < most:
                _, logits = next(iter(list(self.reader.read(tokens + written, len(tokens + written) - 1))))
                written.append(int(logits.argmax()))
                text = self.tokenizer.decode(written)
                is_cut = not (self.reader.ends(written[-1]) or any(stop in text for stop in stops))
            read = written[:-1]
            if written and self.reader.ends(written[-1]):
                written.pop()
            return [postprocess_generated_text(self.tokenizer.decode(written), stops, None), is_cut, read]

        results = [""] * len(requests)
        assert self.unfinished is not None
        for i, (text, is_cut, _) in zip(order, self._answer_all(prompts, answer), strict=True):
            results[i] = text
            if is_cut:
                self.unfinished.add(requests[i].args[0])
        return results
