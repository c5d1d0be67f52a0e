"""vLLM's own engine by itself, in a process of its own: what bench.search compares the searcher with.

The engine has the arguments, the cores and the weights of a run's engine, and is driven as vLLM's `LLM.generate` drives
it, by `add_request` and `step` alone, with twice as many sequences requested as fit: no pipe, no `Response`, no event
loop, no rewards. Only that process imports this module, since it imports vLLM.
"""

import itertools
import time

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from search import worker
from search.engine import EngineSettings


class Alone(worker.Worker):
    """A worker that measures its engine, and serves no requests meanwhile."""

    names = map(str, itertools.count())  # of requests, never the same twice

    def rate(self, call: int, prompts: list[list[int]], sampling: dict, final: bool, seconds: float) -> None:
        """Generated tokens/s for so long, once the engine is full.

        Args:
            call: its number.
            prompts: tokens of each, requested in turn.
            sampling: vLLM's own settings, `n` among them.
            final: whether only finished responses are returned, as by `LLM.generate`, or each token as it comes.
            seconds: of the measurement.
        """
        params = SamplingParams(**sampling)
        params.output_kind = RequestOutputKind.FINAL_ONLY if final else RequestOutputKind.CUMULATIVE
        turn, requested = itertools.cycle(prompts), set[str]()
        began, responses, tokens = 0.0, 0, 0
        while not began or time.perf_counter() - began < seconds:
            while self.engine.get_num_unfinished_requests() < 2 * self.slots:
                requested.add(name := next(self.names))
                self.engine.add_request(name, tokens_input(next(turn)), params)
            for output in self.engine.step():
                ended = [each for each in output.outputs if each.finish_reason]
                responses += len(ended)
                tokens += sum(len(each.token_ids) for each in ended)
                if output.finished:
                    requested.remove(output.request_id)
            if not began and responses >= self.slots:
                began, tokens = time.perf_counter(), 0
        passed = time.perf_counter() - began
        self.engine.abort_request(list(requested))
        self.send((call, tokens / passed, None))


def serve(pipe, settings: EngineSettings) -> None:
    """Run such an engine, in a process that is set up as a run's engines are."""
    worker.Worker = Alone  # type: ignore[misc]
    worker.serve(pipe, settings)
