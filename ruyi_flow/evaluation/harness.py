"""The exits of a family as models of lm-evaluation-harness. One pass scores all exits, and the results are cached."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ruyi_flow.family.every_exit import Tree, exit_logits
from ruyi_flow.local import Family
from ruyi_flow.training.distill import answers

__all__ = ["ExitLM", "Report", "ResultCache", "cache_key"]

Report = Callable[[str, int, int], None]
"""Called with a phase's name, the amount that is done, and the total."""


class ResultCache:
    """Results by exit and question, in memory and in a file from which an interrupted run resumes.

    Args:
        path: file with lines of [key, value].
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+", encoding="utf-8", newline="\n")
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        self._values: dict[str, Any] = dict(json.loads(line) for line in whole.splitlines())
        self._file.truncate(len(whole))  # json.dumps writes ASCII, so characters are bytes

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._file.write(json.dumps([key, value]) + "\n")

    def flush(self) -> None:
        """Flush new results to the operating system."""
        self._file.flush()

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def cache_key(exit: int, kind: str, *question: Any) -> str:
    """Return the key of one exit's result for one question."""
    return f"{exit}/{kind}/{hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]}"


class ExitLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-evaluation-harness that answers with one exit of a family.

    Args:
        family: the whole family.
        exit: the exit that answers.
        exits: all exits that will get the same questions.
        cache: results of all these exits.
        batch_tokens: most tokens in one pass.
        report: called with the progress.
    """

    def __init__(
        self, family: Family, exit: int, exits: Sequence[int], cache: ResultCache, *, batch_tokens: int, report: Report
    ) -> None:
        super().__init__()
        self.family, self.exit, self.exits, self.cache = family, exit, sorted(exits), cache
        self.batch_tokens, self.report = batch_tokens, report
        self.tokenizer = family.tokenizer
        self.max_length = family.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return the name for the harness's own caches."""
        return str(self.family.checkpoint.folder.name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, with the tokenizer's special tokens unless the text begins with one."""
        begin = self.tokenizer.bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and begin and string.startswith(begin):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See the harness."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        self._score(pairs)
        return [tuple(self.cache[cache_key(self.exit, "score", *pair)]) for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See the harness."""
        windows: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows.append([(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, rolling)])
        self._score([pair for text in windows for pair in text])
        return [sum(self.cache[cache_key(self.exit, "score", *pair)][0] for pair in text) for text in windows]

    def _score(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        """Compute, for every exit, each continuation's log-likelihood after its context, and whether it is greedy."""
        waiting: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for context, continuation in dict.fromkeys(pairs):
            if any(cache_key(p, "score", context, continuation) not in self.cache for p in self.exits):
                waiting[context].append(continuation)
        trees: list[tuple[Tree, tuple[int, ...]]] = []  # with the uncut context
        for context, continuations in waiting.items():
            room = self.max_length + 1 - max(map(len, continuations))
            if len(context) <= room:
                trees += [(tree, context) for tree in _trees(context, continuations, self.batch_tokens)]
            else:  # like the harness: each continuation keeps as much of the end of the context as fits
                for continuation in continuations:
                    cut = (*context, *continuation)[-(self.max_length + 1) :][: -len(continuation)]
                    trees.append((Tree(cut, (continuation,)), context))
        trees.sort(key=lambda item: -len(item[0]))
        total, done = sum(len(tree.continuations) for tree, _ in trees), 0
        while trees:
            count = max(1, self.batch_tokens // len(trees[0][0]))
            batch, trees = trees[:count], trees[count:]
            self._score_batch(batch)
            done += sum(len(tree.continuations) for tree, _ in batch)
            self.report("scoring", done, total)
        self.cache.flush()

    def _score_batch(self, batch: Sequence[tuple[Tree, tuple[int, ...]]]) -> None:
        chosen: list[Tensor] = []
        wanted: list[int] = []
        for tree, _ in batch:
            rows, start = [], len(tree.context)
            for continuation in tree.continuations:
                rows += [len(tree.context) - 1, *range(start, start + len(continuation) - 1)]
                start += len(continuation) - 1
                wanted += continuation
            chosen.append(torch.tensor(rows))
        for exit, logits, _ in exit_logits(self.family.model, self.exits, [tree for tree, _ in batch], chosen):
            target = torch.tensor(wanted, device=logits.device)
            likely = (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).cpu()
            greedy = (logits.argmax(-1) == target).cpu()
            start = 0
            for tree, context in batch:
                for continuation in tree.continuations:
                    stop = start + len(continuation)
                    score = float(likely[start:stop].sum()), bool(greedy[start:stop].all())
                    self.cache[cache_key(exit, "score", context, continuation)] = score
                    start = stop

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See the harness; samples if a request asks for it."""
        ends = self.tokenizer.decode([self.eot_token_id])
        alike: dict[str, list[str]] = defaultdict(list)  # settings as JSON -> contexts
        names = []
        for request in requests:
            context, settings = request.args
            name = cache_key(self.exit, "text", context, settings)
            names.append(name)
            if name not in self.cache:
                alike[json.dumps(settings)].append(context)
        total, done = sum(map(len, alike.values())), 0
        for settings_json, contexts in alike.items():
            settings = normalize_gen_kwargs(json.loads(settings_json), 256)
            until, most = handle_stop_sequences(settings.get("until"), eos=ends), settings["max_gen_toks"]
            prompts = [tuple(self.tok_encode(c)[-(self.max_length - most) :]) for c in contexts]
            longest = max(map(len, prompts))
            given = answers(
                self.family.model,
                prompts,
                exit=self.exit,
                max_new_tokens=most,
                max_positions=longest + most,
                batch=max(1, min(64, len(prompts), 2 * self.batch_tokens // (longest + most))),
                temperature=float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0,
                eos_token_ids=(self.eot_token_id,),
                ended=self._ended(until),
            )
            for answer in given:
                text = self.tokenizer.decode(answer.token_ids)
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                self.cache[cache_key(self.exit, "text", contexts[answer.index], json.loads(settings_json))] = text
                self.cache.flush()
                done += 1
                self.report(f"exit {self.exit} answering", done, total)
        return [str(self.cache[name]) for name in names]

    def _ended(self, until: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Return a test for a stop text in the last tokens, each of which has at least one character."""
        reach = max(map(len, until), default=0) + 8

        def ended(token_ids: Sequence[int]) -> bool:
            tail = self.tokenizer.decode(token_ids[-reach:])
            return any(stop in tail for stop in until if stop)

        return ended


def _trees(context: tuple[int, ...], continuations: Sequence[tuple[int, ...]], size: int) -> Iterator[Tree]:
    """Yield trees of a context with as many continuations as fit into `size` tokens, but at least one."""
    taken: list[tuple[int, ...]] = []
    for continuation in continuations:
        if taken and len(Tree(context, (*taken, continuation))) > size:
            yield Tree(context, tuple(taken))
            taken = []
        taken.append(continuation)
    yield Tree(context, tuple(taken))
