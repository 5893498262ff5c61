"""What a layer keeps: the chosen history and, always, the window."""

import torch
from torch import Tensor


def with_window(history: Tensor, prompt_len: int, window: int) -> Tensor:
    """Append the prompt's last tokens to the chosen ones.

    Args:
        history: int [N, T], token ids below ``prompt_len - window``, ascending.
        prompt_len: Tokens of the prompt.
        window: Protected tokens at its end.

    Returns:
        int [N, T + window], same dtype and device, ascending.

    """
    recent = torch.arange(
        prompt_len - window, prompt_len, dtype=history.dtype, device=history.device
    )
    return torch.cat([history, recent.expand(len(history), -1)], dim=1)
