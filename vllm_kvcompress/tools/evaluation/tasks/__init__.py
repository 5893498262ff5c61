"""The tasks, and the names by which the command line finds them."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_kvcompress.tools.evaluation.task import EvaluationError, Task
from vllm_kvcompress.tools.evaluation.tasks import chat, likelihood, longbench, needle, ruler


def find(names: Iterable[str], longbench_hub: str | None = None) -> list[Task]:
    """Tasks by name, in order, each once.

    Args:
        names: Names of tasks; what stands before the slash, such as ``ruler``, for all of a suite;
            ``chat/`` before either for the model's chat template around it, and ``nll/`` before
            all for the likelihood of the right answers.
        longbench_hub: Hub dataset from which LongBench is read instead of its files, as in
            :class:`~vllm_kvcompress.tools.evaluation.tasks.longbench.LongBench`.

    Raises:
        EvaluationError: There is no such task.

    """
    tasks: list[Task] = [
        *map(ruler.Ruler, ruler.NAMES),
        needle.NeedleGrid(),
        *(longbench.LongBench(dataset, longbench_hub) for dataset in longbench.SETS),
        likelihood.Perplexity(),
    ]
    known = {task.name: task for task in tasks}
    found: dict[str, Task] = {}
    for name in names:
        chatting = name.removeprefix(likelihood.PREFIX)
        inner = chatting.removeprefix(chat.PREFIX)
        matching = [known[n] for n in known if n == inner or n.startswith(f"{inner}/")]
        if not matching:
            suites = sorted({n.split("/")[0] for n in known})
            members = [n for n in known if n.startswith(f"{inner.split('/')[0]}/")]
            raise EvaluationError(
                f"there is no task {name!r}: known are {', '.join(members or suites)}"
            )
        for task in matching:
            chosen = chat.Chat(task) if inner != chatting else task
            chosen = likelihood.AnswerLikelihood(chosen) if chatting != name else chosen
            found[chosen.name] = chosen
    return list(found.values())
