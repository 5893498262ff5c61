"""Any task's prompts as a chat: the model's template around context and question.

Instruct models are served so, and it is what a method has to cope with there: the last tokens
before the answer are then the template's, not the question's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt, Source, Task

PREFIX = "chat/"
"""Before a task's name."""

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Chat(Task):
    """A task's prompts, as one message of the user and the beginning of the answer to it.

    Attributes:
        task: Task whose prompts are asked.

    """

    task: Task

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's with ``chat/`` before it."""
        return f"{PREFIX}{self.task.name}"

    def prompts(self, source: Source, *, length: int, count: int, seed: int) -> list[Prompt]:
        """The task's prompts in the template, whose tokens are not counted in ``length``.

        Raises:
            EvaluationError: The model has no chat template, or what the task raises.

        """
        before, after = _template(source)
        made = self.task.prompts(source, length=length, count=count, seed=seed)
        return [
            replace(
                prompt,
                context=before + prompt.context,
                question=prompt.question.removesuffix(prompt.opening) + after + prompt.opening,
            )
            for prompt in made
        ]


def _template(source: Source) -> tuple[str, str]:
    """Text that the template puts before and after the user's message.

    The tokenizer adds a beginning-of-sequence token again, so the template's is left out.
    """
    tokenizer = source.tokenizer
    if not tokenizer.chat_template:
        raise EvaluationError(f"{PREFIX} tasks need a chat template, which {source.model} lacks")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, mark, after = text.partition(_MARK)
    if not mark:
        raise EvaluationError(f"the chat template of {source.model} leaves the user's text out")
    if tokenizer("")["input_ids"] == [tokenizer.bos_token_id]:
        before = before.removeprefix(tokenizer.bos_token)
    return before, after
