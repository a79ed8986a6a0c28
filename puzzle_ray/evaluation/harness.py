"""lm-evaluation-harness (extra `eval`) on parents and children: our model class, its tasks, and questions from .jsonl files.

    from lm_eval import simple_evaluate
    from puzzle_ray.evaluation.harness import PuzzleLM
    simple_evaluate(PuzzleLM("runs/gkd-KEY/child"), tasks=["arc_easy"])

Questions need no network. Their lines are `query`, `choices`, `gold` (rank the choices), `context_options`, `continuation`, `gold` (rank
the contexts), or `context`, `continuation` (foretell the continuation).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate, utils
from lm_eval.api import task as lm_eval_task
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from puzzle_ray.data.foreign import reason_of
from puzzle_ray.errors import ConfigError, DataError, ParentError
from puzzle_ray.evaluation.question_files import OPTIONS, TEXTS, kind_of, read_lines
from puzzle_ray.evaluation.reader import Reader
from puzzle_ray.evaluation.requests import Answer, Chunk, Continuations, Ids, Likelihoods, chunked, joined
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.evaluation.task_names import WHERE, entry_name, is_questions
from puzzle_ray.evaluation.tasks import TaskAnswers, values_of
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.tokenizer import tokenizer_of
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.scoring.halves import Half, halves, question_digest

AskChunks = Callable[[Sequence[Chunk]], list[Answer]]
NEW_TOKENS = 256  # of an answer, where a task says nothing
NO_POSITIONS = 2048  # tokens that are read of a model without a limit, as lm_eval has it


@register_model("puzzle_ray")
class PuzzleLM(TemplateLM):
    """A child or a parent, in float32, for lm_eval. Its numbers are those of lm_eval's own `hf` model.

    `ask` answers chunks of requests; without it they are answered in this process, by the model in the folder.
    `trusted`: the tokenizer's own code may run.
    """

    def __init__(
        self,
        pretrained: str,
        batch_tokens: int = 8192,
        ask: AskChunks | None = None,
        trusted: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.ask = ask or _asked_here(Reader(pretrained, batch_tokens, trusted=trusted))
        path = locate(pretrained)
        self.tokenizer = tokenizer_of(pretrained, trusted)
        self.max_length = getattr(read_config(path), "max_position_embeddings", None) or NO_POSITIONS

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            problem = "an empty context is asked, and the tokenizer has no token that begins or ends a text"
            raise ParentError("parent", problem, "name eos_token in tokenizer_config.json, or leave such tasks out")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm_eval's `hf`: the tokenizer's own special tokens, but no second one at the beginning."""
        specials = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        begin = "" if specials == (None, None) else self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **how))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """In chunks of requests that stand together, so that the choices of a question do.

        A context without a token, such as one of spaces, is read like an empty one. Raises DataError for a continuation without a token.
        """
        pairs: list[tuple[Ids, Ids]] = []
        for words, context, continuation in requests:
            if not continuation:
                raise _without_token(words[1])
            pairs.append((tuple(context) or (self.prefix_token_id,), tuple(continuation)))
        return self._likelihoods(pairs)

    def _likelihoods(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        answers: list[Answer] = self.ask([Likelihoods(part) for part in chunked(pairs)])
        log_prob, is_greedy = joined(answers, "log_prob"), joined(answers, "is_greedy")
        return list(zip(log_prob.tolist(), is_greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Ids, Ids]] = []
        sizes = []
        for (text,) in (request.args for request in requests):
            found = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [(tuple(a), tuple(b)) for a, b in map(utils.make_disjoint_window, found)]
            windows += own
            sizes.append(len(own))
        of_windows = iter(self._likelihoods(windows))
        return [sum(next(of_windows)[0] for _ in range(size)) for size in sizes]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy unless a task says `do_sample`. The tokenizer's end of text ends an answer, and so do the task's strings."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        parts: list[tuple[tuple[int, ...], tuple[str, ...]]] = []
        chunks: list[Chunk] = []
        for words, numbers in groups.items():
            kwargs = json.loads(words)
            until = kwargs.get("until") or []
            stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
            how: dict[str, Any] = {
                "stop": stop,
                "max_tokens": int(kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", NEW_TOKENS))),
            }
            if kwargs.get("do_sample"):
                how |= {"temperature": float(kwargs.get("temperature", 1.0)), "top_p": float(kwargs.get("top_p", 1.0))}
            for part in chunked(numbers):
                prompts = tuple(tuple(self.tok_encode(requests[number].args[0])) for number in part)
                parts.append((part, stop))
                chunks.append(Continuations(prompts, **how))
        for (part, stop), answer in zip(parts, self.ask(chunks), strict=True):
            for number, ids, length in zip(part, answer["ids"], answer["length"], strict=True):
                text = str(self.tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True))
                texts[number] = text[: min((text.find(s) for s in stop if s in text), default=len(text))]
        return texts


def _without_token(text: str) -> DataError:
    return DataError(WHERE, f"{text!r} has no token of its own to be foretold", "leave the question out, or write another text")


def _asked_here(reader: Reader) -> AskChunks:
    return lambda chunks: [reader.answer(chunk) for chunk in chunks]


# tasks


def check_tasks(names: Sequence[str]) -> None:
    """Raises ConfigError, or DataError, for what can be known to be wrong without the data of lm_eval's own tasks."""
    for number, name in enumerate(names):
        if entry_name(name) in map(entry_name, names[:number]):
            raise _twice(name)
    with _quiet():
        known = [] if all(map(is_questions, names)) else TaskManager().all_tasks
        for name in names:
            if is_questions(name):
                _questions_task(name)
            elif name not in known:
                raise _unknown(name, known)


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    remedy = f"{did_you_mean(name, known)} (`lm_eval ls tasks` lists them); or name a .jsonl file of questions"
    return ConfigError(WHERE, f"lm_eval has no task {name!r}", remedy)


def _twice(name: str) -> ConfigError:
    remedy = "name every task once, and call files of questions differently"
    return ConfigError(WHERE, f"{name!r} has a task that is there already", remedy)


class Tasks:
    """The tasks that a config names, loaded once: every model is asked the same. Raises ConfigError, DataError."""

    def __init__(self, names: Sequence[str], half: Half | None, limit: int | None) -> None:
        with _quiet():
            self.manager = TaskManager(include_defaults=not all(map(is_questions, names)))  # else it reads thousands of files
            self.entries: dict[str, list[str]] = {}  # what the user named -> the names of its tasks
            self.tasks: dict[str, Any] = {}
            for name in names:
                self._add(name)
        self.documents = {name: _documents(name, task, half, limit) for name, task in self.tasks.items()}

    def _add(self, name: str) -> None:
        if is_questions(name):
            entry, found = entry_name(name), {entry_name(name): _questions_task(name)}
        else:
            if name not in self.manager.all_tasks:
                raise _unknown(name, self.manager.all_tasks)
            try:
                entry, found = name, self.manager.load([name])["tasks"]
            except Exception as error:  # data sets of the hub, and code of the task
                problem = f"task {name!r} cannot be loaded ({reason_of(error)})"
                raise DataError(WHERE, problem, "see that its data set can be reached, or name a .jsonl file") from None
        if entry in self.entries or self.tasks.keys() & found.keys():
            raise _twice(name)
        self.entries[entry] = list(found)
        self.tasks |= found

    def evaluate(self, model: PuzzleLM, config: EvaluateConfig, seed: int) -> TaskAnswers:
        """One model's values of every question, as lm_eval computes them."""
        with _quiet():
            results = simple_evaluate(
                model,
                tasks=list(self.tasks.values()),
                num_fewshot=config.num_fewshot,
                samples={name: own for name, own in self.documents.items() if len(own) < len(self.tasks[name].eval_docs)},
                bootstrap_iters=0,
                task_manager=self.manager,
                random_seed=seed,
                numpy_random_seed=seed % 2**32,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        return TaskAnswers(
            {name: values_of(task, results["samples"][name]) for name, task in self.tasks.items()},
            {name: _figures(results["results"][name]) for name in self.tasks},
        )

    def chances(self) -> dict[str, float]:
        """What guessing gives, for the tasks whose documents have choices."""
        found = {}
        for name, task in self.tasks.items():
            if task.OUTPUT_TYPE == "multiple_choice":
                documents = task.eval_docs
                own = [1 / len(task.doc_to_choice(documents[i])) for i in self.documents[name]]
                found[name] = sum(own) / len(own)
        return found


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` -> its value, as lm_eval prints it."""
    return {key: float(v) for key, v in results.items() if "," in key and "_stderr," not in key and isinstance(v, int | float)}


def _documents(name: str, task: Any, half: Half | None, limit: int | None) -> list[int]:
    """The numbers of the documents that are asked, of one half or of all. Raises DataError where there is none."""
    documents = task.eval_docs
    numbers = list(range(len(documents)))
    if half is not None:
        digests = [_digest(task, documents[i]) for i in numbers]
        numbers = [i for i, own in zip(numbers, halves(digests, [name] * len(numbers)), strict=True) if own == half]
    numbers = numbers[:limit]
    if not numbers:
        raise DataError(WHERE, f"task {name!r} has no question for the half to {half}", "leave it out, or set evaluate.half=all")
    return numbers


def _digest(task: Any, document: Mapping[str, Any]) -> bytes:
    if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
        return question_digest(str(task.doc_to_text(document)), [str(choice) for choice in task.doc_to_choice(document)])
    return question_digest(json.dumps(document, sort_keys=True, default=str), ())


def write_questions(names: Sequence[str], file: str) -> int:
    """Writes the multiple-choice questions of tasks as lines for `scoring.downstream`, each with its task. Returns their number.

    `scoring.downstream` and `evaluate.half` then split them alike. Raises ConfigError for a task without choices.
    """
    tasks = Tasks(names, None, None)
    lines = []
    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            raise ConfigError(WHERE, f"task {name!r} ranks no choices behind a question", "name multiple-choice tasks")
        for document in task.eval_docs:
            gold, choices = task.doc_to_target(document), task.doc_to_choice(document)
            row = {"query": task.doc_to_text(document), "choices": choices, "task": name}
            lines.append(json.dumps(row | {"gold": gold if isinstance(gold, int) else choices.index(gold)}) + "\n")
    try:
        Path(file).expanduser().write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "--out", f"{file!r} cannot be written ({error.strerror})", "name a file in a folder that is there"
        ) from None
    return len(lines)


# questions from files


def _questions_task(path: str) -> Any:
    from datasets import Dataset, DatasetDict

    found = read_lines(path)
    fields = kind_of(found[0], path)
    kind: dict[str, Any] = {"output_type": "multiple_choice", "metric_list": [_metric("acc"), _metric("acc_norm")]}
    if "query" in fields:
        kind |= {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
    elif "context_options" in fields:
        kind |= {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        kind["metric_list"] = [_metric("acc")]
    else:
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        kind = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": lambda row: f" {row['continuation']}"}
        kind["metric_list"] = [_metric("acc"), perplexity]
    asked = [{name: row[name] for name in sorted(found[0].keys() & (TEXTS | OPTIONS | {"gold"}))} for row in found]
    dataset = DatasetDict({"test": Dataset.from_list(asked)})
    splits = {"test_split": "test", "fewshot_split": "test"}
    return ConfigurableTask(config={"task": entry_name(path), "custom_dataset": lambda **_: dataset, **splits, **kind})


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval without its remarks and its bars, and without a look at git and at what is installed; its errors are shown."""
    logger, silent = logging.getLogger("lm_eval"), {"get_git_commit_hash": lambda: None, "add_env_info": lambda _: None}
    known = [(evaluator, name, does) for name, does in silent.items() if hasattr(evaluator, name)]
    places = [(lm_eval_task, "tqdm", lambda items, **_: items), *known]
    level, before = logger.level, [getattr(module, name) for module, name, _ in places]
    logger.setLevel(logging.ERROR)
    for module, name, does in places:
        setattr(module, name, does)
    try:
        yield
    finally:
        logger.setLevel(level)
        for (module, name, _), own in zip(places, before, strict=True):
            setattr(module, name, own)
