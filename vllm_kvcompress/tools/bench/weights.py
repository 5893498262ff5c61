"""The bytes of a model that a decode step reads."""

from typing import Any

from vllm_kvcompress.tools.plan.model import ServedModel
from vllm_kvcompress.tools.plan.weights import weight_bytes


def read_bytes(model: ServedModel, config: Any) -> int:
    """Return the bytes of the weights without an input embedding of which a step reads some rows.

    All experts of a mixture are counted, although a small batch reads only some of them.

    Args:
        model: The model as vLLM serves it.
        config: Its configuration.

    Raises:
        CommandError: The size of the weights is not known.

    """
    size, _ = weight_bytes(model, config)
    text = config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", True))
    if tied or model.quantized:
        return size
    return size - int(text.vocab_size) * int(text.hidden_size) * model.dtype.itemsize
