# ruff: noqa: N802 - a module that stands in for another has its names
"""NVML: what is read of a GPU, of which GPUs, and what happens where something is missing."""

import sys
from ctypes import c_ulonglong
from types import ModuleType, SimpleNamespace

import pytest

from ardiff.monitor import gpu
from ardiff.monitor.gpu import THROTTLE, GpuState, open_nvml, why_not
from ardiff.monitor.memory import GB

CONSTANTS = {
    "NVML_CLOCK_SM": 1,
    "NVML_CLOCK_MEM": 2,
    "NVML_TEMPERATURE_GPU": 0,
    "NVML_VOLATILE_ECC": 0,
    "NVML_MEMORY_ERROR_TYPE_CORRECTED": 0,
    "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
    "NVML_PAGE_RETIREMENT_CAUSE_COUNT": 2,
    "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX": 138,
    "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX": 139,
    "NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES": 202,
    "NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES": 204,
    "NVML_ERROR_NOT_SUPPORTED": 3,
    "NVML_ERROR_LIBRARY_NOT_FOUND": 12,
    "NVML_ERROR_GPU_IS_LOST": 15,
    "NVML_ERROR_RESET_REQUIRED": 16,
}
ANSWERS = {
    "nvmlDeviceGetName": lambda gpu: gpu.name,
    "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
    "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=97, memory=40),
    "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80 * GB, used=60 * GB, free=20 * GB),
    "nvmlDeviceGetPowerUsage": lambda gpu: 398_500,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 400_000,
    "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
    "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1365, 2: 1593}[kind],
    "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: (7, 1)[kind],
    "nvmlDeviceGetRemappedRows": lambda gpu: (2, 1, 0, 0),
    "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x1 | 0x4 | 0x40,
    "nvmlDeviceGetNvLinkState": lambda gpu, link: int(link != 3),
    "nvmlDeviceGetRetiredPagesPendingStatus": lambda gpu: 1,
    "nvmlDeviceGetRetiredPages": lambda gpu, cause: [0x1000] * (cause + 1),
    "nvmlDeviceGetTemperatureV": lambda gpu, sensor: 62,
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x8,
}
EVERYTHING = GpuState(
    name="NVIDIA A800-SXM4-80GB",
    uuid="GPU-aa",
    utilization=97.0,
    memory_used_gb=60.0,
    memory_total_gb=80.0,
    power_w=398.5,
    power_limit_w=400.0,
    temperature_c=61.0,
    sm_clock_mhz=1365.0,
    memory_clock_mhz=1593.0,
    ecc_corrected=7,
    ecc_uncorrected=1,
    retired_pages=3,
    repair_pending=False,
    remap_failed=False,
    throttle=("power cap", "hardware thermal slowdown"),
    nvlinks_active=7,
    nvlinks_total=8,
    nvlink_rx_gb=0.0,
    nvlink_tx_gb=0.0,
)


class Gpu:
    """A board, or a slice of one."""

    def __init__(self, uuid, board=None):
        self.name, self.uuid, self.board = "NVIDIA A800-SXM4-80GB", uuid, board
        self.links = 8
        self.sent = self.received = 2**20  # KiB over each link, as NVML counts from the driver's start
        self.lost = False
        self.missing = set()  # functions that it does not support


class FakeNvml(ModuleType):
    """pynvml as far as it is asked for; remembers the names of what was."""

    class NVMLError(Exception):
        def __init__(self, value):
            super().__init__({15: "GPU is lost", 12: "NVML Shared Library Not Found"}.get(value, f"error {value}"))
            self.value = value

    def __init__(self, *gpus, driver=True, fields=(138, 139), summed=True):
        super().__init__("pynvml")
        self.gpus, self.driver, self.fields, self.summed = gpus, driver, fields, summed
        self.asked, self.opened = set(), 0
        self.forgotten = set()  # functions that this module has not

    def __getattribute__(self, name):
        if name.startswith("nvml"):
            self.asked.add(name)
        return super().__getattribute__(name)

    def __getattr__(self, name):
        if name.startswith("__") or name in self.forgotten:
            raise AttributeError(name)
        if name in CONSTANTS:
            self.asked.add(name)
            return CONSTANTS[name]
        return lambda *arguments: self.call(name, *arguments)

    def nvmlInit(self):
        self.opened += 1
        if not self.driver:
            self.fail("NVML_ERROR_LIBRARY_NOT_FOUND")

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        return len([gpu for gpu in self.gpus if gpu.board is None])

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        return found[0] if found else self.fail("NVML_ERROR_NOT_SUPPORTED")

    def fail(self, name):
        raise self.NVMLError(CONSTANTS[name])

    def call(self, name, device, *arguments):
        if device.lost:
            self.fail("NVML_ERROR_GPU_IS_LOST")
        if name in device.missing:
            self.fail("NVML_ERROR_NOT_SUPPORTED")
        if name == "nvmlDeviceGetDeviceHandleFromMigDeviceHandle":
            return device.board or self.fail("NVML_ERROR_NOT_SUPPORTED")
        if name == "nvmlDeviceGetNvLinkState" and arguments[0] >= device.links:
            self.fail("NVML_ERROR_NOT_SUPPORTED")
        if name == "nvmlDeviceGetFieldValues":
            return [self.field(device, *field) for field in arguments[0]]
        return ANSWERS[name](device, *arguments)

    def field(self, device, number, scope):
        links = device.links if scope == 2**32 - 1 else 1
        known = number in self.fields and (self.summed or links == 1)
        count = links * (device.sent if number in (138, 202) else device.received)
        value = SimpleNamespace(ullVal=c_ulonglong(count if number < 200 else 1024 * count).value, dVal=-1.0)
        return SimpleNamespace(nvmlReturn=0 if known else 3, valueType=3, value=value)


def opened(module, visible=None):
    return open_nvml(module, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def test_everything_that_a_gpu_tells():
    module = FakeNvml(Gpu("GPU-aa"))
    nvml = opened(module)
    assert nvml.count == 1 and why_not() is None
    assert nvml.read(0) == EVERYTHING
    with pytest.raises(IndexError, match="GPU 1 of 1"):
        nvml.read(1)
    nvml.close()
    assert module.opened == 0


@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilization"}),
        ("nvmlDeviceGetMemoryInfo", {"memory_used_gb", "memory_total_gb"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_limit_w"}),
        ("nvmlDeviceGetClockInfo", {"sm_clock_mhz", "memory_clock_mhz"}),
        ("nvmlDeviceGetTotalEccErrors", {"ecc_corrected", "ecc_uncorrected"}),
        ("nvmlDeviceGetNvLinkState", {"nvlinks_active", "nvlinks_total", "nvlink_rx_gb", "nvlink_tx_gb"}),
        ("nvmlDeviceGetFieldValues", {"nvlink_rx_gb", "nvlink_tx_gb"}),
        ("nvmlDeviceGetName", {"name"}),
    ],
)
def test_what_is_not_supported_is_none_and_nothing_else(function, fields):
    device = Gpu("GPU-aa")
    device.missing = {function}
    state = opened(FakeNvml(device)).read(0)
    for field in GpuState.__dataclass_fields__:
        expected = None if field in fields else getattr(EVERYTHING, field)
        assert getattr(state, field) == expected, field


def test_older_and_newer_modules_and_cards():
    device = Gpu("GPU-aa")
    device.missing = {"nvmlDeviceGetRemappedRows", "nvmlDeviceGetCurrentClocksEventReasons"}
    module = FakeNvml(device)
    module.forgotten = {"nvmlDeviceGetTemperature"}
    state = opened(module).read(0)
    assert (state.temperature_c, state.retired_pages, state.throttle) == (62.0, 3, ("hardware slowdown",))
    assert (state.repair_pending, state.remap_failed) == (True, None)
    device.missing |= {"nvmlDeviceGetRetiredPagesPendingStatus", "nvmlDeviceGetRetiredPages"}
    device.missing |= {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    state = opened(module).read(0)
    assert (state.retired_pages, state.repair_pending, state.throttle) == (None, None, None)


def test_rows_that_wait_for_a_reset_or_could_not_be_remapped(monkeypatch):
    for rows, expected in (((0, 1, 1, 0), (1, True, False)), ((0, 9, 0, 1), (9, False, True))):
        monkeypatch.setitem(ANSWERS, "nvmlDeviceGetRemappedRows", lambda gpu, rows=rows: rows)
        state = opened(FakeNvml(Gpu("GPU-aa"))).read(0)
        assert (state.retired_pages, state.repair_pending, state.remap_failed) == expected


def test_a_module_that_does_not_know_a_counter_is_not_asked_for_it(monkeypatch):
    """pynvml's structures do not take None for a number: it is a TypeError."""
    module = FakeNvml(Gpu("GPU-aa"), fields=(202, 204))
    module.forgotten = {"NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX"}
    asked = []
    monkeypatch.setattr(module, "field", lambda *a, original=module.field: asked.append(a[1]) or original(*a))
    assert opened(module).read(0).nvlink_tx_gb == 0
    assert asked and None not in asked


@pytest.mark.parametrize(("fields", "summed"), [((138, 139), True), ((138, 139), False), ((202, 204), False)])
def test_nvlink_traffic_counts_from_the_first_read(fields, summed):
    device = Gpu("GPU-aa")
    nvml = opened(FakeNvml(device, fields=fields, summed=summed))
    assert nvml.read(0).nvlink_tx_gb == 0
    device.sent += 2**20  # a GiB over each of 8 links
    device.received += 2**19
    state = nvml.read(0)
    assert (state.nvlink_tx_gb, state.nvlink_rx_gb) == (8.0, 4.0)
    device.sent = device.received = 2**17  # the driver was loaded anew
    state = nvml.read(0)
    assert (state.nvlink_tx_gb, state.nvlink_rx_gb) == (1.0, 1.0)


def test_a_card_without_nvlink():
    device = Gpu("GPU-aa")
    device.links = 0
    state = opened(FakeNvml(device, fields=())).read(0)
    assert state.nvlinks_active is None and state.nvlinks_total is None and state.nvlink_rx_gb is None


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-cc"]),
        ("2,0", ["GPU-cc", "GPU-aa"]),
        (" 1 , 2", ["GPU-ab", "GPU-cc"]),
        ("GPU-cc,GPU-ab", ["GPU-cc", "GPU-ab"]),
        ("GPU-c", ["GPU-cc"]),
        ("GPU-a", []),  # of two
        ("0,7,1", ["GPU-aa"]),  # as CUDA does it
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-5,0", ["MIG-5", "GPU-aa"]),
        ("MIG-6", []),
    ],
)
def test_only_the_gpus_that_cuda_shows(visible, uuids):
    boards = [Gpu("GPU-aa"), Gpu("GPU-ab"), Gpu("GPU-cc")]
    nvml = opened(FakeNvml(*boards, Gpu("MIG-5", boards[1])), visible)
    assert [nvml.read(index).uuid for index in range(nvml.count)] == uuids


def test_a_slice_tells_its_memory_and_its_boards_power():
    board = Gpu("GPU-aa")
    part = Gpu("MIG-5", board)
    part.name = "NVIDIA A800 MIG 1g.10gb"
    part.missing = {name for name in ANSWERS if name not in ("nvmlDeviceGetName", "nvmlDeviceGetUUID")}
    part.missing.remove("nvmlDeviceGetMemoryInfo")
    state = opened(FakeNvml(board, part), "MIG-5").read(0)
    assert (state.name, state.memory_total_gb) == ("NVIDIA A800 MIG 1g.10gb", 80.0)
    assert (state.power_w, state.temperature_c, state.ecc_uncorrected, state.utilization) == (398.5, 61.0, 1, None)


def test_a_lost_gpu_is_told_and_hurts_nobody():
    lost, other = Gpu("GPU-aa"), Gpu("GPU-ab")
    nvml = opened(FakeNvml(lost, other))
    assert nvml.read(0).lost is None
    lost.lost = True
    assert nvml.read(0) == GpuState(lost="GPU is lost")
    assert nvml.read(1).lost is None


def test_without_a_driver_or_the_package(monkeypatch):
    assert opened(FakeNvml(driver=False)) is None
    assert why_not() == (
        "no GPU statistics: NVML does not start (NVML Shared Library Not Found); is there an NVIDIA driver?"
    )
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    assert "nvidia-ml-py is not installed" in why_not()


def test_the_real_module_has_all_names_and_values():
    pynvml = pytest.importorskip("pynvml")
    module = FakeNvml(Gpu("GPU-aa"), fields=())
    opened(module, "GPU-aa,MIG-5")
    everything_else = Gpu("GPU-ab")
    everything_else.missing = set(ANSWERS)
    module.gpus = (everything_else,)
    opened(module).read(0)
    assert len(module.asked) > 25
    assert [name for name in sorted(module.asked | set(CONSTANTS)) if not hasattr(pynvml, name)] == []
    assert {name: getattr(pynvml, name) for name in CONSTANTS} == CONSTANTS
    reasons = (
        "SwPowerCap",
        "HwSlowdown",
        "SyncBoost",
        "SwThermalSlowdown",
        "HwThermalSlowdown",
        "HwPowerBrakeSlowdown",
    )
    assert list(THROTTLE) == [getattr(pynvml, f"nvmlClocksEventReason{name}") for name in reasons]
    assert [name for name, _ in pynvml.c_nvmlValue_t._fields_] == list(gpu.VALUE_FIELDS)
    assert gpu.VALUE_FIELDS.index("ullVal") == pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
    assert pynvml.NVML_NVLINK_MAX_LINKS <= gpu.MAX_LINKS


def test_of_this_machine():
    nvml = open_nvml()
    if nvml is None:
        assert why_not().startswith("no GPU statistics: ")
        return
    for index in range(nvml.count):
        state = nvml.read(index)
        assert state.name and 0 < state.memory_used_gb <= state.memory_total_gb
    nvml.close()
