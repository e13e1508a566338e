"""An lm-eval backend that scores a GGUF file in llama.cpp: what ships is scored as it will be run.

Requests are sorted, and what one shares with the request before it stays in the cache; logits are computed only where
they are read. Its scores are compared with those of another file alone, never with those of transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from tasks.core.errors import ConfigError
from tasks.evaluation.prefix_lm import check_greedy
from tasks.models.llama import LlamaReader

Request = tuple[Any, list[int], list[int]]
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
        totals = []
        for done, (text,) in enumerate((request.args for request in requests), start=1):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*window)[0] for window in map(utils.make_disjoint_window, windows)))
            self.on_progress(done, len(requests))
        return totals

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of every request's continuation."""
        results = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for done, i in enumerate(order, start=1):
            results[i] = self._score(*requests[i][1:])
            self.on_progress(done, len(requests))
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = (context + continuation)[:-1][-self.max_length :]
        first = len(tokens) - len(continuation)
        total, greedy = 0.0, True
        for place, logits in self.reader.read(tokens, first):
            token = continuation[place - first]
            best = float(logits.max())
            total += float(logits[token]) - best - float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
            greedy &= bool(logits[token] == best)
        return total, greedy

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what greedy decoding gives for every request, up to its stop sequences."""
        results = [""] * len(requests)
        for done, i in enumerate(sorted(range(len(requests)), key=lambda i: str(requests[i].args[0])), start=1):
            prompt, asked = requests[i].args
            options = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
            eos = self.tokenizer.decode([self.eot_token_id])
            stops = [s for s in handle_stop_sequences(options.pop("until", None), eos=eos) if s]
            most = int(options.pop("max_gen_toks"))
            if check_greedy(options, 1.0) != 1.0:
                raise ConfigError("A task penalises repetition, which eval.on_gguf does not: remove one of them.")
            tokens = self.tok_encode(prompt)[-(self.max_length - most) :]
            written: list[int] = []
            while len(written) < most:
                _, logits = next(iter(list(self.reader.read(tokens + written, len(tokens + written) - 1))))
                written.append(int(logits.argmax()))
                text = self.tokenizer.decode(written)
                if self.reader.ends(written[-1]) or any(stop in text for stop in stops):
                    break
            else:
                assert self.unfinished is not None
                self.unfinished.add(prompt)
            if written and self.reader.ends(written[-1]):
                written.pop()
            results[i] = postprocess_generated_text(self.tokenizer.decode(written), stops, None)
            self.on_progress(done, len(requests))
        return results
