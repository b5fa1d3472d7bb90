"""Runs of one pipeline that share the calls of its denoiser.

Each run is the pipeline's own `__call__`, on a shallow copy of the pipeline with a scheduler of its own, in a thread.
A proxy stands in the denoiser's place. It hands each call over and waits for the answer. When all runs wait, their
inputs are concatenated, the network is called once, and each run gets its rows of the answer. So runs with other
numbers of steps, prompts and seeds move on together, and guidance stays the pipeline's own business.

The threads take turns: only one of them, or the caller's, is ever running. They are coroutines in all but name.
"""

import contextvars
import copy
import inspect
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from timetuner_core.models.out_of_memory import is_out_of_memory
from timetuner_core.pipelines.batch_limit import BatchLimit
from timetuner_core.pipelines.joining import (
    NetworkCall,
    batches,
    content_of,
    copied,
    join,
    relative_difference,
    split,
)
from timetuner_core.pipelines.kinds import PROMPT_ENCODERS, SHARED_NETWORKS
from timetuner_core.pipelines.predictions import ShownStep, predicted_x0

MAX_BATCH = 16
MAX_THREADS = 64
# Encoders' answers to the prompts that were used last are remembered, up to so many, and up to so many bytes together.
MAX_REMEMBERED_PROMPTS = 64
MAX_REMEMBERED_BYTES = 2**28
# The largest share by which a row's answer may depend on the batch it is in, by the network's dtype.
MAX_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class RunCancelledError(Exception):
    """The run was cancelled before its end."""


class _Closed(BaseException):
    """Ends a run whose caller has left. It is no `Exception`, so that a pipeline's own handlers let it pass."""


@dataclass
class Request:
    """One run of a pipeline.

    Attributes:
        call: arguments of the pipeline's `__call__`.
        scheduler: this run's own; it takes the place of the pipeline's.
        is_remembered: whether the network's answers to it are kept for requests that begin alike.
        is_previewed: whether `SharedCalls.preview` may be asked what it predicts.
    """

    call: Mapping[str, Any]
    scheduler: Any
    is_remembered: bool = False
    is_previewed: bool = False


@dataclass
class Result:
    """How a run ended.

    Attributes:
        output: what the pipeline gave; None if it failed.
        x: the sample that the scheduler's last step gave. x0: what a step of a previewed run predicted, if it is told.
        first_step: at which of its scheduler's steps it began. num_steps: how many steps it has made.
        num_calls: how often it asked the denoiser. rows: the rows of its largest call.
    """

    output: Any = None
    error: BaseException | None = None
    x: Tensor | None = None
    x0: Tensor | None = None
    first_step: int | None = None
    num_steps: int = 0
    num_calls: int = 0
    rows: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, by an error or with an output."""
        return self.output is not None or self.error is not None

    @property
    def latents(self) -> Tensor:
        """The pipeline's latents, or where it gives none, the last sample of its scheduler.

        Raises:
            the run's own error.
        """
        if self.error is not None:
            raise self.error
        first = next(iter(self.output.values())) if isinstance(self.output, Mapping) else self.output[0]
        latents = first if isinstance(first, Tensor) else self.x
        if latents is None:
            raise ValueError("the pipeline made no step of its scheduler; accepted: one that makes a step")
        return latents


class SharedCalls:
    """Runs a pipeline's requests with shared calls of its denoiser; the pipeline itself is left as it is.

    Where a cache such as FirstBlockCache is on, its state belongs to one run: requests then run one after the other.

    Args:
        max_batch: the most rows of one call of the network. largest_batch: more than that, up to this many, if timing
            such calls shows that it pays, for each kind of call; see `BatchLimit`.
        max_seconds: a call of more than `max_batch` rows takes at most this long.
        max_threads: the most requests that run at once.
        refuse_large: a run whose own calls have more rows than `max_batch` fails. If not, they are made alone.
        check_rows: compare the first shared call of each kind with the call of its first request alone. If a network's
            rows depend on each other by more than rounding, all calls of that kind are made alone.

    Attributes:
        networks: those whose calls are shared, by name. pipeline_class: that of the copies which make the runs.
        num_calls: how often a network was called. num_asked: how often a run asked for one.
        num_rows: the rows of all calls. most_rows: those of the largest.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        max_batch: int = MAX_BATCH,
        largest_batch: int | None = None,
        max_seconds: float = 0.25,
        max_threads: int = MAX_THREADS,
        refuse_large: bool = True,
        check_rows: bool = True,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_threads", max_threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: 1 or more")
        self.pipeline = pipeline
        self.pipeline_class = _class_with_known_device(type(pipeline))
        self.networks = {name: part for name in SHARED_NETWORKS if (part := getattr(pipeline, name, None)) is not None}
        if not self.networks:
            accepted = f"a pipeline with one of {', '.join(SHARED_NETWORKS)}"
            raise ValueError(f"{type(pipeline).__name__} has no denoiser; accepted: {accepted}")
        self._max_batch, self._max_threads, self._check_rows = max_batch, max_threads, check_rows
        self._refuse_large = refuse_large
        new_limit = partial(BatchLimit, max_batch, largest_batch or max_batch, max_seconds)
        self._limits: defaultdict[tuple[str, Hashable], BatchLimit] = defaultdict(new_limit)
        self._remembered: dict[tuple[str, bytes], Any] = {}
        self._prompts: OrderedDict[tuple[str, bytes], Any] = OrderedDict()  # The one that was used last is the last.
        self._prompt_bytes = 0
        self._separable: dict[tuple[str, Hashable], bool] = {}
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        self._runs_alone = False
        self._device: torch.device | None = None
        self.num_calls = self.num_asked = self.num_rows = self.most_rows = 0

    def submit(self, request: Request) -> Result:
        """Queue a request; `step` moves it on. The result is filled in when the run ends.

        Raises:
            ValueError: a scheduler that another run has, or `torch.autocast`, which would not reach the run's thread.
        """
        if any(run.request.scheduler is request.scheduler for run in (*self._waiting, *self._running)):
            raise ValueError("scheduler is that of another request; accepted: one for each request")
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise ValueError("torch.autocast is on; accepted: a pipeline in its own precision, outside of it")
        run = _Run(self, request)
        self._waiting.append(run)
        return run.result

    def step(self) -> bool:
        """Move each running request on by one call of the network, and start waiting ones. Whether any is left."""
        if not self._running:
            self._runs_alone = any(map(has_state, self.networks.values()))
        most = 1 if self._runs_alone else self._max_threads
        while self._waiting and len(self._running) < most:
            run = self._waiting.popleft()
            self._running.append(run)
            run.advance()
        self._end_runs()
        asked = [run for run in self._running if run.asked is not None]
        try:
            self._answer(asked)
        except BaseException:
            self.close()
            raise
        for run in asked:
            run.advance()
        self._end_runs()
        return bool(self._running or self._waiting)

    @property
    def device(self) -> torch.device:
        """The device that the pipeline computes on, as it was when the runs of now began."""
        if self._device is None or not (self._running or self._waiting):
            self._device = self.pipeline._execution_device
        return self._device

    def first_call(self, request: Request) -> NetworkCall:
        """The first call of a network that a request would make. The call is not made, and the request ends there.

        Raises:
            ValueError: it makes none.
            what the pipeline raises.
        """
        run = _Run(self, request)
        run.advance()
        asked = run.asked
        run.close()
        if not self._running:
            self.pipeline.maybe_free_model_hooks()
        if asked is None:
            raise run.result.error or ValueError("the pipeline ended without a call of its denoiser")
        return asked

    def run(self, requests: Sequence[Request], is_cancelled: Callable[[], bool] = lambda: False) -> list[Result]:
        """Run requests to their ends. An error of one is its result's, and ends no other.

        Raises:
            RunCancelledError: `is_cancelled` said so after a step. The pipeline's interrupt ends the runs, where it has
                one, so that the state of caches and hooks is that after any other run.
        """
        try:
            results = [self.submit(request) for request in requests]
            is_left = True
            while is_left:
                is_left = self.step()
                if is_cancelled() and is_left:
                    self.cancel()
                    raise RunCancelledError("cancelled while the pipeline ran")
        finally:
            self.close()
        return results

    def cancel(self) -> None:
        """End all runs at their next step, by the pipeline's interrupt; the calls of the present step are answered."""
        self._drop_waiting({id(run.result) for run in self._waiting})
        for run in self._running:
            run.interrupt()
        while self._running:
            self.step()

    def interrupt(self, result: Result) -> None:
        """End the run with this result at its next step, by the pipeline's interrupt. Others go on."""
        self._drop_waiting({id(result)})
        for run in self._running:
            if run.result is result:
                run.interrupt()

    def preview(self, result: Result) -> Any:
        """The images that the pipeline would give for the x0 that a previewed run predicts now.

        The pipeline itself makes it, from the same arguments: all its steps end at x0, and the network's last answer
        stands for all others, so that nothing but the decoder is called.

        Returns:
            The pipeline's output; None before the first prediction, or where the scheduler tells none.

        Raises:
            what the pipeline raises.
        """
        run = next((run for run in self._running if run.result is result), None)
        x0 = result.x0
        if run is None or x0 is None or not run.answers:
            return None
        scheduler = copy.deepcopy(run.request.scheduler)
        scheduler.step = lambda *_args, **_kwargs: ShownStep((x0,))
        shown = _Run(self, Request({**run.request.call, **_new_generators(run.request.call)}, scheduler))
        shown.advance()
        while shown.asked is not None:
            shown.answer = copied(run.answers.get(shown.network, next(iter(run.answers.values()))))
            shown.advance()
        shown.join()
        if shown.result.error is not None:
            raise shown.result.error
        return shown.result.output

    def forget(self) -> None:
        """Forget the answers that were kept for requests that begin alike."""
        self._remembered.clear()

    def close(self) -> None:
        """End all threads, and put hooks and caches into the state they have after any run of the pipeline.

        More requests may be submitted afterwards. Encoded prompts are remembered.
        """
        self.end([run.result for run in (*self._waiting, *self._running)])

    def end(self, results: Iterable[Result]) -> None:
        """End the runs with these results now. Others go on."""
        ids = set(map(id, results))
        self._drop_waiting(ids)
        ending = [run for run in self._running if id(run.result) in ids]
        for run in ending:
            run.close()
        self._running = [run for run in self._running if id(run.result) not in ids]
        if ending and not self._running:
            self.pipeline.maybe_free_model_hooks()

    def _drop_waiting(self, ids: Collection[int]) -> None:
        """Drop the waiting runs whose results have these ids."""
        for run in self._waiting:
            if id(run.result) in ids:
                run.result.error = RunCancelledError("cancelled before it began")
        self._waiting = deque(run for run in self._waiting if id(run.result) not in ids)

    def _end_runs(self) -> None:
        ended = [run for run in self._running if run.has_ended]
        self._running = [run for run in self._running if not run.has_ended]
        for run in ended:
            run.join()
        if ended and (not self._running or self._runs_alone):
            self.pipeline.maybe_free_model_hooks()

    def _answer(self, runs: "Sequence[_Run]") -> None:
        """Answer what the runs ask, from memory or by as few calls of the networks as there can be."""
        if self._runs_alone:
            for run in runs:
                self.num_asked += 1
                run.answer = self._call_one(run.network, run.asked_call)
            return
        remembers = bool(self._remembered) or any(run.request.is_remembered for run in runs)

        def key_of(call: NetworkCall) -> bytes:
            """Calls of one key are answered alike. A digest copies an input to the CPU, so it is made if needed."""
            return call.content if remembers else id(call).to_bytes(8)

        groups: dict[tuple[str, Hashable], dict[bytes, NetworkCall]] = {}
        for run in runs:
            call = run.asked_call
            if (run.network, key_of(call)) not in self._remembered:
                groups.setdefault((run.network, call.kind), {})[key_of(call)] = call
        answers: dict[tuple[str, bytes], Any] = {}
        for (network, kind), calls in groups.items():
            limit = self._limits[network, kind]
            for part in batches(list(calls.values()), limit.rows):
                made = self._call_together(network, kind, part, limit)
                answers |= {(network, key_of(call)): answer for call, answer in zip(part, made, strict=True)}
        for run in runs:
            key = (run.network, key_of(run.asked_call))
            self.num_asked += 1
            answer = self._remembered[key] if key in self._remembered else answers[key]
            if run.request.is_remembered and not isinstance(answer, BaseException):
                self._remembered[key] = answer
            is_kept = remembers or run.request.is_previewed
            run.answer = copied(answer) if is_kept and not isinstance(answer, BaseException) else answer
            if run.request.is_previewed and not isinstance(answer, BaseException):
                run.answers[run.network] = answer

    def _call_together(self, network: str, kind: Hashable, calls: list[NetworkCall], limit: BatchLimit) -> list[Any]:
        """The answers, or the errors, of calls of one kind."""
        if len(calls) == 1 or not self._separable.get((network, kind), True):
            return [self._call_one(network, call) for call in calls]
        try:
            answers = split(self._timed(network, join(calls), limit), calls)
        except Exception as error:  # Each call by itself tells whose error it is.
            if is_out_of_memory(error):
                limit.give_up()
            return [self._call_one(network, call) for call in calls]
        if self._check_rows and (network, kind) not in self._separable:
            alone = self._call_one(network, calls[0])
            dtype = self.networks[network].dtype
            agree = not isinstance(alone, Exception) and differ_by_rounding(alone, answers[0], dtype)
            self._separable[network, kind] = agree
            if not agree:
                return [alone, *[self._call_one(network, call) for call in calls[1:]]]
        return answers

    def _call_one(self, network: str, call: NetworkCall) -> Any:
        try:
            if self._refuse_large and (call.rows or 1) > self._max_batch:
                raise ValueError(f"max_batch is {self._max_batch}; accepted: {call.rows} or more, the rows of one run")
            return self._call(network, call)
        except Exception as error:
            return error

    def _timed(self, network: str, call: NetworkCall, limit: BatchLimit) -> Any:
        """The answer to a call, which teaches its limit something until that is found."""
        if not limit.would_learn(call.rows or 1):
            return self._call(network, call)
        started = time.perf_counter()
        answer = self._call(network, call)
        first = next(each for each in tree_leaves(answer) if isinstance(each, Tensor))
        first.flatten()[0].item()  # A GPU is done only when a number has arrived.
        limit.note(call.rows or 1, time.perf_counter() - started)
        return answer

    def _call(self, network: str, call: NetworkCall) -> Any:
        self.num_calls += 1
        self.num_rows += call.rows or 1
        self.most_rows = max(self.most_rows, call.rows or 1)
        with torch.no_grad():
            return call.on(self.networks[network])

    def encode(self, name: str, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A text encoder's answer, from memory if it was asked the same lately."""
        key = (name, content_of([list(args), kwargs]))
        if key not in self._prompts:
            answer = encoder(*args, **kwargs)
            self._prompts[key] = answer
            self._prompt_bytes += _num_bytes(answer)
            while len(self._prompts) > MAX_REMEMBERED_PROMPTS or self._prompt_bytes > MAX_REMEMBERED_BYTES:
                self._prompt_bytes -= _num_bytes(self._prompts.popitem(last=False)[1])
            return copied(answer)
        self._prompts.move_to_end(key)
        return copied(self._prompts[key])


class _Run:
    """A request in its thread."""

    def __init__(self, shared: SharedCalls, request: Request) -> None:
        self.request, self.result = request, Result()
        self.network = ""
        self.asked: NetworkCall | None = None
        self.answer: Any = None
        self.answers: dict[str, Any] = {}  # The last one of each network, of a previewed run.
        self._is_interrupted = self._is_closed = self.has_ended = False
        # One thread releases such a lock for the other, in strict turns. A semaphore of Python takes ten times as long.
        self._resumed, self._paused = threading.Lock(), threading.Lock()
        self._resumed.acquire()
        self._paused.acquire()
        self._thread: threading.Thread | None = None
        self._pipeline = self._copy_of(shared)

    @property
    def asked_call(self) -> NetworkCall:
        assert self.asked is not None
        return self.asked

    def advance(self) -> None:
        """Let the thread run until it asks for the network again, or ends."""
        self.asked = None
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)
            self._thread.start()
        else:
            self._resumed.release()
        self._paused.acquire()

    def interrupt(self) -> None:
        """End the run at its next step."""
        self._is_interrupted = True
        if hasattr(self._pipeline, "_interrupt"):
            self._pipeline._interrupt = True

    def close(self) -> None:
        """End the thread now."""
        self._is_closed = True
        while not self.has_ended:
            self.advance()
        self.join()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def ask(self, network: str, call: NetworkCall) -> Any:
        """Wait for a network's answer. It is called in the thread."""
        if self._is_interrupted and not hasattr(self._pipeline, "_interrupt"):
            raise RunCancelledError("cancelled")
        if self._is_closed:
            raise _Closed
        self.network, self.asked = network, call
        self.result.num_calls += 1
        self.result.rows = max(self.result.rows, call.rows or 1)
        self._paused.release()
        self._resumed.acquire()
        answer, self.answer = self.answer, None
        if self._is_closed:
            raise _Closed
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _work(self) -> None:
        try:
            with self._noted_steps():
                self.result.output = self._pipeline(**self.request.call)
            if self._is_interrupted:
                self.result.error = RunCancelledError("cancelled")
        except BaseException as error:  # It is the caller's to read. Nothing is above it in this thread.
            self.result.error = RunCancelledError("closed") if isinstance(error, _Closed) else error
        finally:
            self.has_ended = True
            self._paused.release()

    def _copy_of(self, shared: SharedCalls) -> Any:
        """The pipeline with this run's scheduler and with proxies; it has no effect on the original."""
        pipeline = copy.copy(shared.pipeline)
        pipeline.__class__ = shared.pipeline_class
        replaced: dict[str, Any] = {"_known_device": shared.device}
        for name, network in shared.networks.items():
            replaced[name] = _Proxy(network, partial(self._ask, name, network))
        for name in PROMPT_ENCODERS:
            if isinstance(encoder := getattr(pipeline, name, None), torch.nn.Module):
                replaced[name] = _Proxy(encoder, partial(shared.encode, name, encoder))
        replaced["scheduler"] = self.request.scheduler
        # The pipeline's own hooks are freed once all runs have ended, and not under a run that goes on.
        replaced["maybe_free_model_hooks"] = lambda: None
        replaced["_progress_bar_config"] = {"disable": True}
        pipeline.__dict__.update(replaced)  # diffusers' own way would rewrite the configuration.
        return pipeline

    def _ask(self, name: str, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.ask(name, NetworkCall.of(network, args, kwargs))

    @contextmanager
    def _noted_steps(self) -> Iterator[None]:
        """Note the scheduler's steps in the result; afterwards, the scheduler is as it was.

        A scheduler may add noise by a generator that its pipeline does not pass, as those of flow models do not. Its
        noise is then the request's own, and not that of whichever runs are under way.
        """
        scheduler = self.request.scheduler
        step, own = scheduler.step, vars(scheduler).get("step")
        may_lack = inspect.signature(step).parameters.get("generator")
        lacking = {"generator": self.request.call.get("generator")} if may_lack and may_lack.default is None else {}

        @wraps(step)
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **lacking | kwargs)
            self.result.x = output[0]
            self.result.num_steps += 1
            if self.request.is_previewed:
                given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
                self.result.x0 = predicted_x0(scheduler, given["model_output"], given["sample"], output)
            if self.result.first_step is None:
                self.result.first_step = (getattr(scheduler, "_step_index", None) or 1) - 1
            return output

        scheduler.step = noted
        try:
            yield
        finally:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own


def _class_with_known_device(pipeline_class: type[Any]) -> type[Any]:
    """A pipeline's class that is told its device. diffusers searches all modules for it, each time that it is asked."""
    known_device = property(lambda pipeline: pipeline._known_device)
    own = {"_execution_device": known_device, "__module__": pipeline_class.__module__}
    return type(pipeline_class.__name__, (pipeline_class,), own)


class _Proxy:
    """Stands in a network's place: its calls are handed over, and all else is the network's own."""

    def __init__(self, network: Any, handed_over: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.__dict__["_network"], self.__dict__["_handed_over"] = network, handed_over

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The network's class: pipelines ask what kind of network they have."""
        return type(self._network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handed_over(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._network, name, value)


def _new_generators(call: Mapping[str, Any]) -> dict[str, Any]:
    """Generators in the place of those of a call, which are left as they are."""
    match call.get("generator"):
        case None:
            return {}
        case list() as several:
            return {"generator": [torch.Generator(each.device).manual_seed(0) for each in several]}
        case one:
            return {"generator": torch.Generator(one.device).manual_seed(0)}


def differ_by_rounding(first: Any, second: Any, dtype: torch.dtype) -> bool:
    """Whether two answers agree but for what the batch they were in may change in this precision."""
    return relative_difference(first, second) <= MAX_DIFFERENCE.get(dtype, max(MAX_DIFFERENCE.values()))


def _num_bytes(answer: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(answer) if isinstance(each, Tensor))


def has_state(network: Any) -> bool:
    """Whether hooks of a network remember earlier calls, as FirstBlockCache and its like do."""
    registries = [getattr(module, "_diffusers_hook", None) for module in network.modules()]
    return any(hook._is_stateful for registry in registries if registry for hook in registry.hooks.values())
