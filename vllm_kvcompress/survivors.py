"""What a layer keeps: the chosen history and, always, the window."""

import torch
from torch import Tensor


def with_window(history: Tensor, num_tokens: int, window: int) -> Tensor:
    """Append the last tokens to the chosen ones.

    Args:
        history: int [N, T], token ids below ``num_tokens - window``.
        num_tokens: Tokens that there are.
        window: Protected tokens at their end.

    Returns:
        int [N, T + window], same dtype and device, in the order given.

    """
    recent = torch.arange(
        num_tokens - window, num_tokens, dtype=history.dtype, device=history.device
    )
    return torch.cat([history, recent.expand(len(history), -1)], dim=1)


def by_worth(chosen: Tensor, worth: Tensor) -> Tensor:
    """Sort chosen tokens so that any number of the best ones stands at the end.

    Args:
        chosen: int [N, T], token ids, ascending.
        worth: fp32 [N, S'], of every token.

    Returns:
        [N, T], same dtype: ascending worth; among equals the lower id counts as better.

    """
    values = worth.gather(1, chosen.to(torch.int64))
    best_first = values.argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, best_first).flip(1)
