"""What NVIDIA's management library (NVML) says of the GPUs: load, power, temperature, clocks, errors, links.

NVML talks to the driver, never to a CUDA stream: reading waits for no kernel and needs no CUDA context. A GPU that does
not tell something (a MIG slice, an older driver, a card without NVLink) has None there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ardiff.monitor.memory import GB

KIB = 1024
ALL_LINKS = 2**32 - 1  # the scope of a field that is summed over all links
MAX_LINKS = 36

# Why clocks are below what they are set to. NVML's other reasons (idle, clocks set by hand) take nothing away.
THROTTLE = {
    0x04: "power cap",  # at the power limit: usual under full load
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
# Counters of what went over NVLink: (transmitted, received, bytes per unit, one field for all links).
LINK_COUNTERS = (
    ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", KIB, True),
    ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", KIB, False),
    ("NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES", "NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES", 1, False),
)
VALUE_FIELDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by nvmlValueType_t


@dataclass(frozen=True)
class GpuState:
    """One GPU at one moment; None where it does not tell. Memory and NVLink traffic in GiB."""

    name: str | None = None
    uuid: str | None = None
    utilization: float | None = None  # %: the part of the last moments in which any kernel ran
    memory_used_gb: float | None = None  # by all processes
    memory_total_gb: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    ecc_corrected: int | None = None  # since the driver was loaded
    ecc_uncorrected: int | None = None
    retired_pages: int | None = None  # or, from Ampere on, remapped rows; over the life of the card
    repair_pending: bool | None = None  # rows or pages that are replaced at the next reset
    remap_failed: bool | None = None  # from Ampere on: a row could not be replaced
    throttle: tuple[str, ...] | None = None  # words of THROTTLE
    nvlinks_active: int | None = None
    nvlinks_total: int | None = None
    nvlink_rx_gb: float | None = None  # since this process first read it
    nvlink_tx_gb: float | None = None
    lost: str | None = None  # NVML's words when the GPU cannot be used any more


class Nvml:
    """NVML of this node, restricted to the GPUs that CUDA shows this process and in that order.

    The order of numbers is NVML's, by PCI bus; CUDA's is the same where all GPUs are of one kind, or with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """

    def __init__(self, module: Any, visible: str | None) -> None:
        self._nvml = module
        self._boards = [self._ask("nvmlDeviceGetHandleByIndex", index) for index in range(module.nvmlDeviceGetCount())]
        self._handles = self._select(visible)
        self._first: dict[int, tuple[float, float]] = {}  # NVLink's counters when they were first read
        self._counter: dict[int, tuple[str, str, int, bool] | None] = {}

    @property
    def count(self) -> int:
        """GPUs that this process sees; `read` takes 0 to count - 1, as torch.device("cuda", index) does."""
        return len(self._handles)

    def read(self, index: int) -> GpuState:
        """The state of a GPU. Raises IndexError where there is none."""
        if not 0 <= index < self.count:
            raise IndexError(f"GPU {index} of {self.count}")
        handle = self._handles[index]
        # A MIG slice knows its own memory and name; power, temperature, clocks and errors are its board's.
        board = self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle
        nvml = self._nvml
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        active, total = self._links(board)
        received, sent = (None, None) if total is None else self._link_traffic(index, board, total)
        retired, pending, failed = self._retired(board)
        return GpuState(
            name=self._ask("nvmlDeviceGetName", handle),
            uuid=self._ask("nvmlDeviceGetUUID", handle),
            utilization=_number(self._ask("nvmlDeviceGetUtilizationRates", handle), lambda rates: rates.gpu),
            memory_used_gb=_number(memory, lambda info: info.used / GB),
            memory_total_gb=_number(memory, lambda info: info.total / GB),
            power_w=_number(self._ask("nvmlDeviceGetPowerUsage", board), lambda milliwatts: milliwatts / 1000),
            power_limit_w=_number(self._ask("nvmlDeviceGetEnforcedPowerLimit", board), lambda limit: limit / 1000),
            temperature_c=self._temperature(board),
            sm_clock_mhz=_number(self._ask("nvmlDeviceGetClockInfo", board, nvml.NVML_CLOCK_SM)),
            memory_clock_mhz=_number(self._ask("nvmlDeviceGetClockInfo", board, nvml.NVML_CLOCK_MEM)),
            ecc_corrected=self._ecc(board, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=self._ecc(board, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            retired_pages=retired,
            repair_pending=pending,
            remap_failed=failed,
            throttle=self._throttle(board),
            nvlinks_active=active,
            nvlinks_total=total,
            nvlink_rx_gb=received,
            nvlink_tx_gb=sent,
            lost=self._lost(board),
        )

    def close(self) -> None:
        """Let go of the library; what was opened twice stays open for the other."""
        self._ask("nvmlShutdown")

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What a function of NVML says; None where the driver, the module or the GPU does not know it."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _select(self, visible: str | None) -> list[Any]:
        """Handles of what CUDA_VISIBLE_DEVICES names; as in CUDA, the first that does not exist ends the list."""
        if visible is None:
            return self._boards
        handles: list[Any] = []
        for word in (part.strip() for part in visible.split(",")):
            handle = self._named(word)
            if handle is None:
                break
            handles.append(handle)
        return handles

    def _named(self, word: str) -> Any:
        """A GPU by its number, its UUID or the beginning of that, or a MIG slice by its id; None if there is none."""
        if word.isdecimal():
            return self._boards[int(word)] if int(word) < len(self._boards) else None
        if word.startswith("MIG-"):
            return self._ask("nvmlDeviceGetHandleByUUID", word)
        if not word.startswith("GPU-"):
            return None
        found = [board for board in self._boards if str(self._ask("nvmlDeviceGetUUID", board)).startswith(word)]
        return found[0] if len(found) == 1 else None

    def _lost(self, board: Any) -> str | None:
        """The GPU has fallen off the bus, or needs a reset: NVML's words."""
        gone = (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED)
        if board is None:
            return "the driver gives no access to it"
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(board)
        except self._nvml.NVMLError as error:
            return str(error) if error.value in gone else None
        return None

    def _temperature(self, board: Any) -> float | None:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        for function in ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"):  # the first goes with CUDA 14
            if (celsius := self._ask(function, board, sensor)) is not None:
                return float(celsius)
        return None

    def _ecc(self, board: Any, kind: int) -> int | None:
        return self._ask("nvmlDeviceGetTotalEccErrors", board, kind, self._nvml.NVML_VOLATILE_ECC)

    def _retired(self, board: Any) -> tuple[int | None, bool | None, bool | None]:
        """Rows or pages that were replaced; whether some wait for a reset; whether a row could not be replaced."""
        rows = self._ask("nvmlDeviceGetRemappedRows", board)  # (corrected, uncorrected, pending, failed)
        if rows is not None:
            return rows[0] + rows[1], bool(rows[2]), bool(rows[3])
        causes = range(self._nvml.NVML_PAGE_RETIREMENT_CAUSE_COUNT)
        pages = [self._ask("nvmlDeviceGetRetiredPages", board, cause) for cause in causes]
        pending = self._ask("nvmlDeviceGetRetiredPagesPendingStatus", board)
        retired = None if None in pages else sum(len(each) for each in pages)
        return retired, None if pending is None else bool(pending), None

    def _throttle(self, board: Any) -> tuple[str, ...] | None:
        for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if (bits := self._ask(function, board)) is not None:
                return tuple(word for bit, word in THROTTLE.items() if bits & bit)
        return None

    def _links(self, board: Any) -> tuple[int | None, int | None]:
        """NVLinks that are up, and all that the GPU has; None without NVLink."""
        states: list[int] = []
        for link in range(MAX_LINKS):
            state = self._ask("nvmlDeviceGetNvLinkState", board, link)
            if state is None:
                break
            states.append(state)
        return (sum(map(bool, states)), len(states)) if states else (None, None)

    def _link_traffic(self, index: int, board: Any, links: int) -> tuple[float | None, float | None]:
        """GiB received and sent over NVLink since the first read."""
        if index not in self._counter:
            ways = (way for way in LINK_COUNTERS if self._counted(board, links, way) is not None)
            self._counter[index] = next(ways, None)
        way = self._counter[index]
        now = None if way is None else self._counted(board, links, way)
        if now is None:
            return None, None
        first = self._first.setdefault(index, now)
        if now[0] < first[0] or now[1] < first[1]:  # the driver has been loaded anew
            first = self._first[index] = (0.0, 0.0)
        return (now[1] - first[1]) / GB, (now[0] - first[0]) / GB

    def _counted(self, board: Any, links: int, way: tuple[str, str, int, bool]) -> tuple[float, float] | None:
        """Bytes (sent, received) by one of LINK_COUNTERS, or None where the GPU does not count so."""
        sent, received, unit, summed = way
        totals: list[float] = []
        for name in (sent, received):
            field = getattr(self._nvml, name, None)
            if field is None:  # an older module
                return None
            scopes = [ALL_LINKS] if summed else range(links)
            values = self._ask("nvmlDeviceGetFieldValues", board, [(field, scope) for scope in scopes])
            if values is None or any(value.nvmlReturn for value in values):
                return None
            totals.append(unit * sum(float(getattr(value.value, VALUE_FIELDS[value.valueType])) for value in values))
        return totals[0], totals[1]


def open_nvml(module: ModuleType | None = None, environment: Mapping[str, str] = os.environ) -> Nvml | None:
    """NVML, or None where it cannot be had; `why_not` then says why.

    module: instead of pynvml. environment: where CUDA_VISIBLE_DEVICES is read.
    """
    global _why_not
    if module is None:
        try:
            import pynvml as module  # type: ignore[no-redef]
        except ImportError:
            _why_not = "no GPU statistics: the package nvidia-ml-py is not installed (pip install nvidia-ml-py)"
            return None
    try:
        module.nvmlInit()  # type: ignore[union-attr]
        found = Nvml(module, environment.get("CUDA_VISIBLE_DEVICES"))
    except module.NVMLError as error:  # type: ignore[union-attr]
        _why_not = f"no GPU statistics: NVML does not start ({error}); is there an NVIDIA driver?"
        return None
    _why_not = None
    return found


def why_not() -> str | None:
    """Why the last `open_nvml` gave nothing, in one line."""
    return _why_not


_why_not: str | None = None


def _number(value: Any, of: Callable[[Any], float] = float) -> float | None:
    return None if value is None else float(of(value))
