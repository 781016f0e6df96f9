"""The tasks of lm-evaluation-harness (the extra `lm-eval`, imported nowhere else), for a model of ours.

Every text begins with <BOS>, once, since a model never saw one without, and what is cut off for its length is taken
from behind it.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data import Tokenizer
from inference_budget import Request, Scorer
from launch.commands import InputError

from .items import Measurement, Values, fitted


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """What continuations that are drawn together have in common."""

    most: int  # tokens
    temperature: float

    @classmethod
    def of(cls, options: dict[str, Any]) -> "_Drawing":
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample", False) else 0.0
        return cls(int(options.get("max_gen_toks", 256)), temperature)


class HarnessModel(TemplateLM):
    """A scorer and its tokenizer as what the harness calls a model; pass it to `lm_eval.simple_evaluate(model=...)`."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer, self._tokenizer = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """The ids, with <BOS> before them unless `add_special_tokens` is False."""
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        length = self.scorer.length
        pairs = [
            fitted(Request(context, continuation), length, f"the request {texts[1]!r}")
            for texts, context, continuation in requests
        ]
        return self._scores(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token predicted once, in windows that all begin with <BOS>."""
        pairs, texts = [], []
        for number, request in enumerate(requests):
            tokens = self._tokenizer.encode(request.args[0])
            # One less than there is room for: the harness begins the first window alone with the prefix.
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.scorer.length - 1, 1)
            for context, continuation in map(make_disjoint_window, windows):
                first = [] if context[0] == self.prefix_token_id else [self.prefix_token_id]
                pairs.append(Request([*first, *context], continuation))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (log_probability, _) in zip(texts, self._scores(pairs, disable_tqdm), strict=True):
            totals[number] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to and without its first stop string, or <EOS>; those of like options together."""
        together: dict[_Drawing, list[int]] = {}
        prompts, stops = [], []
        for number, request in enumerate(requests):
            context, options = request.args
            drawing = _Drawing.of(options)
            together.setdefault(drawing, []).append(number)
            prompts.append(self._prompt(context, drawing.most))
            until = options.get("until") or []
            stops.append(tuple(filter(None, [until] if isinstance(until, str) else until)))
        texts = [""] * len(requests)
        with tqdm(desc="generate", total=len(requests), disable=disable_tqdm) as bar:
            for drawing, numbers in together.items():
                numbers.sort(key=lambda number: len(prompts[number]))  # a batch is as wide as its longest
                for start in range(0, len(numbers), self.scorer.rows):
                    some = numbers[start : start + self.scorer.rows]
                    found = self._generated([prompts[n] for n in some], [stops[n] for n in some], drawing)
                    for number, text in zip(some, found, strict=True):
                        texts[number] = text
                    bar.update(len(some))
        return texts

    def _prompt(self, context: str, most: int) -> list[int]:
        tokens, room = self.tok_encode(context), self.scorer.length - most
        if room < 2:
            raise InputError(
                f"max_gen_toks={most} leaves no room for a prompt in a context of {self.scorer.length}; give the task "
                "fewer in its generation_kwargs"
            )
        return [*tokens[:1], *tokens[1:][-(room - 1) :]]

    def _generated(self, prompts: list[list[int]], stops: list[tuple[str, ...]], drawing: "_Drawing") -> list[str]:
        drawn: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)

        def all_ended(new: list[list[int]]) -> bool:
            """Whether each text is at its end, or has its stop string, so that what would follow is cut off anyway."""
            for row, tokens in enumerate(new):
                drawn[row] += tokens
                text = self._tokenizer.continuation(prompts[row], drawn[row]) if stops[row] else ""
                ended[row] = not tokens or any(stop in text for stop in stops[row])
            return all(ended)

        self.scorer.decoder.generate(
            prompts,
            drawing.most,
            temperature=drawing.temperature,
            stop_ids=[self.eot_token_id],
            on_tokens=all_ended,
        )
        texts = [self._tokenizer.continuation(*pair) for pair in zip(prompts, drawn, strict=True)]
        return [_cut(text, some) for text, some in zip(texts, stops, strict=True)]

    def _scores(self, pairs: Sequence[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(desc="answers", total=len(pairs), disable=disable_tqdm) as bar:
            return [(score.log_probability, score.greedy) for score in self.scorer.score(pairs, progress=bar.update)]


def _cut(text: str, stops: Sequence[str]) -> str:
    """What is before the first of the stop strings."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


class Harness:
    """Tasks by their names in the harness, or in a folder of your own.

    Raises:
      InputError: there is no such task or folder.
    """

    def __init__(
        self, tasks: Sequence[str], include_path: str | None, limit: int | None, num_fewshot: int | None
    ) -> None:
        self.tasks, self._options = list(tasks), {"limit": limit, "num_fewshot": num_fewshot}
        # Without its own thousands of tasks, which take seconds to list, unless one of them is meant.
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) - set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=include_path)
        for task in tasks:
            if task not in self._manager.all_tasks:
                where = f" or in {include_path}" if include_path else ""
                version = importlib.metadata.version("lm-eval")
                raise InputError(f"there is no task {task!r} in lm-eval {version}{where}; see lm-eval ls tasks")

    def measure(self, scorer: Scorer, tokenizer: Tokenizer) -> dict[str, Measurement]:
        """What the model made of each task.

        Raises:
          InputError: a task's data cannot be read.
        """
        model = HarnessModel(scorer, tokenizer)
        try:
            found = lm_eval.simple_evaluate(model=model, tasks=self.tasks, task_manager=self._manager, **self._options)
        except OSError as error:
            raise InputError(
                f"{', '.join(self.tasks)}: {error}; lm-evaluation-harness reads its own tasks' data from the hub, "
                "see docs/serving.md for tasks without one"
            ) from None
        return {task: _measurement(found["results"][task], found["samples"][task]) for task in found["samples"]}


def _measurement(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> Measurement:
    """The metrics of a task, from each document where that is a number, else as the harness has summed them up."""
    values: Values = {}
    totals: dict[str, tuple[float, float | None]] = {}
    for name, value in results.items():
        metric, comma, filtered = name.partition(",")
        if not comma or "_stderr" in metric or not isinstance(value, int | float):
            continue
        shown = metric if filtered == "none" else name
        mine = {str(sample["doc_id"]): sample.get(metric) for sample in samples if sample.get("filter") == filtered}
        if mine and all(isinstance(x, int | float) for x in mine.values()):
            values[shown] = {key: float(x or 0) for key, x in mine.items()}
        else:
            error = results.get(f"{metric}_stderr,{filtered}")
            totals[shown] = float(value), float(error) if isinstance(error, int | float) else None
    choices = [len(sample["arguments"]) for sample in samples if "acc" in sample]
    chosen = choices and min(choices) > 1
    return Measurement(values, sum(1 / n for n in choices) / len(choices) if chosen else None, totals)
