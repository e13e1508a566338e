"""An lm-eval backend that computes each shared prefix once and logits only where they are read.

Requests are sorted, so neighbours share prefixes; a row holds a tree of tokens (a question once, its choices as
branches), and one forward pass scores every branch. On a CPU a row goes on from the keys and values of the row before,
so the examples of a task are computed once too, and the layers are this project's own. Scores are lm-eval's.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from tasks.core.errors import ConfigError
from tasks.evaluation.decode import generate
from tasks.evaluation.responses import Begun, is_finite
from tasks.evaluation.tree import KeysAndValues, Text, TokenTree, TreePlan, find_needed, make_rows, split_evenly
from tasks.models.cpu_layers import CpuLayers
from tasks.models.parallel import map_parallel
from tasks.models.products import Product, frozen_head

Request = tuple[Any, list[int], list[int]]
Result = tuple[float, bool]
PLANNED_TOKENS = 768  # of a row on a CPU, with attention that computes nothing in vain
# With a mask, longer rows waste attention on other items' tokens on a CPU; a GPU is kept busy by long ones.
MASKED_TOKENS = {"cpu": 384, "cuda": 8192}
LOGIT_BYTES = 32 << 20  # in float32, at a time
BATCH = 64  # texts that are generated together
GREEDY = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"}


def check_greedy(options: dict[str, Any], penalty: float) -> float:
    """Return the penalty for repetition, `penalty` where a task names none. Raises ConfigError for options that greedy
    decoding has not."""
    odd = sorted(options.keys() - GREEDY)
    if options.get("do_sample") or options.get("num_beams", 1) != 1 or odd:
        raise ConfigError(
            f"A task generates with {', '.join(odd) or 'sampling or beams'}: scores before and after are paired by "
            "greedy decoding. Set do_sample: false and nothing else in its generation_kwargs."
        )
    return float(options.get("repetition_penalty") or penalty)


@torch.inference_mode()
def _gives_the_logits(model: Any, head: Product) -> bool:
    """Return whether a projection of what the decoder gives is the model's logits: some models scale them, or more."""
    tokens = torch.tensor([[0, 1]], device=model.device)
    decoder = model.get_decoder()
    if decoder is model:
        return False
    expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    found = head.forward(decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]).float()
    return bool((found - expected).abs().max() <= 0.02 * expected.abs().max())  # bfloat16's rounding is a tenth of it


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """HFLM on a live model, which it may take over: on a CPU its layers are replaced, and it serves nothing else then.

    `on_progress(done, total)` counts the requests of one kind."""

    def __init__(
        self, model: Any, tokenizer: Any, row_tokens: int | None, on_progress: Callable[[int, int], None]
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8)
        kind = str(self.device).partition(":")[0]
        self.lanes = torch.get_num_threads() if kind == "cpu" else 1
        virtual = getattr(model, "virtual_tokens", 0)
        if virtual:  # they take up context that texts cannot have
            self._max_length = self.max_length - virtual
        self.plans, self.head = False, None
        model.requires_grad_(False)
        if not virtual and (head := frozen_head(model)) is not None:
            if kind == "cpu":
                if not hasattr(model, "fast_layers"):
                    model.fast_layers = CpuLayers(model, head.weight)
                self.plans, head = model.fast_layers.shares_prefix, model.fast_layers.head or head
            if self.plans or _gives_the_logits(model, head):
                self.head = head
        self.row_tokens = row_tokens or (PLANNED_TOKENS if self.plans else MASKED_TOKENS.get(kind, 1024))
        self.on_progress = on_progress
        self.unfinished: set[str] | None = set()
        """Prompts whose answer ended by its length; None where that is not known."""
        self.begun = Begun()
        self._batches = 0
        self._lock = threading.Lock()

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

    # --- log-likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Result]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of every request's continuation."""
        texts = []
        for i, (_, context, continuation) in enumerate(requests):
            # The last token is never an input; a context longer than the model loses its beginning, as in HFLM.
            tokens = (context + continuation)[:-1][-self.max_length :]
            texts.append(Text(i, tokens, len(tokens) - len(continuation)))
        texts.sort(key=lambda text: text.tokens)
        results: list[Result] = [(0.0, False)] * len(requests)
        for i, (nats, greedy) in self.begun.known.items():
            results[i] = nats, greedy
        done = 0
        ended = threading.Event()

        def score(part: Sequence[Text]) -> None:
            nonlocal done
            past: KeysAndValues = {}
            rows = make_rows(part, self.row_tokens, goes_on=self.plans)
            for row, is_needed in zip(rows, self._needed_rows(part), strict=False):
                if ended.is_set():
                    return
                scored: list[tuple[int, Result]] = []
                if is_needed:
                    scored, past = self._score_row(row, past, requests)
                else:
                    kept = {layer: tuple(x[:, : row.keep].contiguous() for x in both) for layer, both in past.items()}
                    past = kept if row.keep else {}  # type: ignore[assignment]
                with self._lock:
                    for i, result in scored:
                        results[i] = result
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                    if all(is_finite(result) for _, result in scored):
                        self.begun.keep(dict(scored))
                    done += len(row.paths)
                    self.on_progress(done, len(requests))

        for _ in map_parallel(score, split_evenly(texts, self.lanes), ended):
            pass
        return results

    def _needed_rows(self, part: Sequence[Text]) -> Iterable[bool]:
        """Return of each row whether it is computed: all but what an earlier process scored."""
        known = self.begun.known
        if not known:
            return repeat(True)
        rows = make_rows(part, self.row_tokens, goes_on=self.plans)
        return find_needed((row.base, all(text.index in known for text, _ in row.paths)) for row in rows)

    @torch.inference_mode()
    def _score_row(
        self, row: TokenTree, past: KeysAndValues, requests: list[Request]
    ) -> tuple[list[tuple[int, Result]], KeysAndValues]:
        """Return (request's index, its result) of every request in the row, and what the next row goes on from."""
        read = sorted({place for text, path in row.paths for place in path[text.read - row.base :]})
        column = {place: j for j, place in enumerate(read)}
        inputs = {
            "input_ids": torch.tensor([row.tokens], device=self.device),
            "position_ids": torch.tensor([row.positions], device=self.device),
            "use_cache": False,
        }
        kept: KeysAndValues = {}
        if self.plans:
            assert self.head is not None
            plan = TreePlan(row, past)
            states = self.model.get_decoder()(**inputs, plan=plan).last_hidden_state[0, read]
            kept, project = plan.kept, self.head.forward
        elif self.head:
            states = self.model.get_decoder()(**inputs, attention_mask=self._mask(row)).last_hidden_state[0, read]
            project = self.head.forward
        else:
            inputs |= {"attention_mask": self._mask(row), "logits_to_keep": torch.tensor(read, device=self.device)}
            states, project = self.model(**inputs).logits[0], lambda logits: logits
        # What is asked of each column: the continuations' tokens, each for one request.
        asked = [
            (column[place], token, i)
            for i, (text, path) in enumerate(row.paths)
            for place, token in zip(path[text.read - row.base :], requests[text.index][2], strict=True)
        ]
        asked.sort()
        totals, greedy = [0.0] * len(row.paths), [True] * len(row.paths)
        rows = max(1, LOGIT_BYTES // (4 * self.model.config.vocab_size))
        place = 0
        for first in range(0, len(read), rows):
            # float32 whatever the model's precision: a bfloat16 sum flips answers by itself.
            logits = project(states[first : first + rows]).float()
            norms, best = logits.logsumexp(-1), logits.argmax(-1)
            end = next((k for k in range(place, len(asked)) if asked[k][0] >= first + rows), len(asked))
            columns = torch.tensor([c - first for c, _, _ in asked[place:end]], device=self.device)
            tokens = torch.tensor([token for _, token, _ in asked[place:end]], device=self.device)
            found = (logits[columns, tokens] - norms[columns]).tolist()
            right = (best[columns] == tokens).tolist()
            for (_, _, i), log_likelihood, is_best in zip(asked[place:end], found, right, strict=True):
                totals[i] += log_likelihood
                greedy[i] &= is_best
            place = end
        return [(text.index, (totals[i], greedy[i])) for i, (text, _) in enumerate(row.paths)], kept

    def _mask(self, row: TokenTree) -> torch.Tensor:
        mask = row.mask().to(self.device)
        if self.model.config._attn_implementation != "eager":
            return mask
        hidden = torch.finfo(self.model.dtype).min  # eager adds the mask: True would add 1, and hide nothing
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~mask, hidden)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what greedy decoding gives for every request, up to its stop sequences. Raises ConfigError for a task
        that samples: before and after could not be paired."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        if not self.plans:
            self.unfinished, self._batches = None, 0
            written: list[str] = super().generate_until(requests, disable_tqdm=True)
            return written
        results = [""] * len(requests)
        done = 0
        ended = threading.Event()

        def take(answers: list[tuple[Text, str, bool]]) -> None:
            """Note texts' answers, and whether each was ended by its length."""
            nonlocal done
            with self._lock:
                for text, answer, is_cut in answers:
                    if self.unfinished is not None and is_cut:
                        self.unfinished.add(requests[text.index].args[0])
                    results[text.index] = answer
                    self.cache_hook.add_partial("generate_until", requests[text.index].args, answer)
                done += len(answers)
                self.on_progress(done, len(requests))

        for group in groups.values():
            options = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            stops = [s for s in handle_stop_sequences(options.pop("until", None), eos=eos) if s]
            most = int(options.pop("max_gen_toks"))
            penalty = check_greedy(options, self.model.generation_config.repetition_penalty or 1.0)
            limit = self.max_length - most
            if limit <= 0:
                raise ConfigError(
                    f"A task generates up to {most} tokens, but the model reads at most {self.max_length}. Set its "
                    "max_gen_toks lower."
                )
            texts = []
            for i in group:
                encoded, _ = self.tok_batch_encode(
                    [requests[i].args[0]], left_truncate_len=limit, truncation=self.truncation
                )
                texts.append(Text(i, encoded[0].tolist(), 0))
            texts.sort(key=lambda text: text.tokens)
            parts = split_evenly(texts, max(self.lanes, -(-len(texts) // BATCH)))

            def write(
                part: Sequence[Text], most: int = most, stops: list[str] = stops, penalty: float = penalty
            ) -> None:
                def is_done(tokens: list[int]) -> bool:
                    over = ended.is_set() or tokens[-1] in self._ends
                    return over or any(stop in self.tok_decode(tokens) for stop in stops)

                known = [self.begun.known.get(text.index) for text in part]
                if None not in known:
                    take([(text, *answer) for text, answer in zip(part, known, strict=True) if answer])
                    return
                assert self.head is not None
                written = generate(
                    self.model.get_decoder(), self.head, [text.tokens for text in part], most, is_done, penalty
                )
                if ended.is_set():
                    return
                answers = []
                for text, tokens in zip(part, written, strict=True):
                    answer = postprocess_generated_text(self.tok_decode(tokens), stops, None)
                    answers.append((text, answer, len(tokens) >= most and not is_done(tokens)))
                take(answers)
                with self._lock:
                    self.begun.keep({text.index: [answer, is_cut] for text, answer, is_cut in answers})

            for _ in map_parallel(write, parts, ended):
                pass
        return results

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return the contexts of a batch with what the library's own generation adds to them, or what it added in an
        earlier process."""
        number = self._batches
        self._batches += 1
        known = self.begun.known.get(number)
        if known is not None:
            return torch.cat([context, torch.tensor(known, dtype=context.dtype, device=context.device)], 1)
        found: torch.Tensor = super()._model_generate(context, max_length, stop, **options)
        self.begun.keep({number: found[:, context.shape[1] :].tolist()})
        return found

    @property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {self.eot_token_id, *([ends] if isinstance(ends, int) else ends or ())}
