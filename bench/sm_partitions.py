"""Streams whose kernels keep to an own part of a GPU's SMs: green contexts of the CUDA driver (12.5 and later).

Of three kernels that write to the same link one may get less than the others, depending on where its blocks happen to
lie. With a part for each they get nearly the same, wherever the parts lie.
"""

from __future__ import annotations

import ctypes

from cuda_driver import call, ordinal_of

_SM_RESOURCE = 1  # CU_DEV_RESOURCE_TYPE_SM
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_GROUP_SMS = 8  # the fewest that a GPU of Hopper is divided into


class _Resource(ctypes.Structure):
    """CUdevResource, of which only `sm_count` is looked at."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("padding", ctypes.c_ubyte * 92),
        ("sm_count", ctypes.c_uint),
        ("others", ctypes.c_uint * 11),
    )


class PartitionStream:
    """A stream whose kernels run on `num_sms` SMs of a device. It lives as long as the process, its context too."""

    def __init__(self, handle: int, num_sms: int) -> None:
        self.handle, self.num_sms = handle, num_sms

    def synchronize(self) -> None:
        """Waits until all that is enqueued is done."""
        call("cuStreamSynchronize", ctypes.c_void_p(self.handle))


def partition_streams(device: int, count: int) -> list[PartitionStream]:
    """One stream each for `count` parts of the device's SMs, of as many groups of SMs.

    The device's primary context has to be there. ValueError for more parts than there are groups; RuntimeError where
    the driver refuses.
    """
    ordinal, whole, num_groups = ordinal_of(device), _Resource(), ctypes.c_uint()
    call("cuDeviceGetDevResource", ordinal, ctypes.byref(whole), _SM_RESOURCE)
    split = (ctypes.byref(num_groups), ctypes.byref(whole), None, 0, _GROUP_SMS)
    call("cuDevSmResourceSplitByCount", None, *split)
    groups = (_Resource * num_groups.value)()
    call("cuDevSmResourceSplitByCount", groups, *split)
    of_part = len(groups) // count
    if of_part == 0:
        raise ValueError(
            f"devices has device {device} {count} times; expected at most {len(groups)}, the parts of its SMs"
        )
    return [_stream_on(ordinal, groups[part : of_part * count : count]) for part in range(count)]


def _stream_on(ordinal: ctypes.c_int, groups: list[_Resource]) -> PartitionStream:
    resources = (_Resource * len(groups))(*groups)
    described, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuDevResourceGenerateDesc", ctypes.byref(described), resources, len(groups))
    call("cuGreenCtxCreate", ctypes.byref(context), described, ordinal, _DEFAULT_STREAM)
    call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, _NON_BLOCKING, 0)
    return PartitionStream(int(stream.value or 0), sum(group.sm_count for group in groups))
