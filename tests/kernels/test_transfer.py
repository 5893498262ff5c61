"""Arrays that are sent together arrive as they were."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kvcompress_kernels import transfer
from kvcompress_kernels.transfer import Parcel


def test_what_waits_in_a_parcel_goes_in_one_copy(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, upload = [], transfer.upload

    def counted(host: Tensor, where: torch.device) -> Tensor:
        sent.append(host)
        return upload(host, where)

    monkeypatch.setattr(transfer, "upload", counted)
    parcel = Parcel(device)
    arrays: list[npt.NDArray[Any]] = [
        np.arange(5, dtype=np.int32),
        np.arange(6, dtype=np.int64).reshape(3, 2).T,
        np.zeros((0, 4), dtype=np.int32),
        np.array([0.5, -1.5], dtype=np.float32),
    ]
    waiting = [parcel.add(array) for array in arrays]
    assert [each.shape for each in waiting] == [array.shape for array in arrays]
    part = waiting[1].rows(1, 2)
    assert not sent
    for each, array in zip(waiting, arrays, strict=True):
        found = each.on_device()
        assert found.device.type == device.type
        assert found.data_ptr() % 16 == 0
        assert np.array_equal(found.cpu().numpy(), array)
        assert found.cpu().numpy().dtype == array.dtype
    assert part.on_device().tolist() == [[1, 3, 5]]
    assert len(sent) == 1
    late = parcel.add(np.array([7]))
    assert late.on_device().tolist() == [7]
    assert len(sent) == 2
