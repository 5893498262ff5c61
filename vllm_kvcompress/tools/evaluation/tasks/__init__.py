"""The tasks, and the names by which the command line finds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_kvcompress.tools.evaluation.task import EvaluationError, Task
from vllm_kvcompress.tools.evaluation.tasks import chat, likelihood, longbench, needle, ruler

NLL_PREFIX = "nll/"
"""Before a task's name: the likelihood of its right answer instead of the score of the model's."""


def all_tasks(longbench_hub: str | None = None) -> Mapping[str, Task]:
    """Every task by name.

    Args:
        longbench_hub: Hub dataset from which LongBench is read instead of its files, as in
            :class:`~vllm_kvcompress.tools.evaluation.tasks.longbench.LongBench`.

    """
    tasks: dict[str, Task] = {}
    for found in (ruler.tasks(), needle.tasks(), longbench.tasks(longbench_hub)):
        tasks.update(found)
    tasks.update(likelihood.tasks())
    return tasks


def find(names: Iterable[str], longbench_hub: str | None = None) -> list[Task]:
    """Tasks by name, in order, each once.

    Args:
        names: Names of tasks; what stands before the slash, such as ``ruler``, for all of a suite;
            ``chat/`` before either for the model's chat template around it, and ``nll/`` before
            all for the likelihood of the right answers.
        longbench_hub: The same as for :func:`all_tasks`.

    Raises:
        EvaluationError: There is no such task.

    """
    known = all_tasks(longbench_hub)
    found: dict[str, Task] = {}
    for name in names:
        chatting = name.removeprefix(NLL_PREFIX)
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
