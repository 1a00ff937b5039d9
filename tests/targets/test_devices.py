"""What is known of a device stands in its file, and reaches those who need it from there."""

import importlib.util
import subprocess
import sys

import pytest

from bi_compile import OptionError, ops
from bi_compile.targets import DEVICES, TARGETS, for_device, get_target


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_brings_its_kernels_and_targets(name: str) -> None:
    device = DEVICES[name]
    assert ops.KERNELS[name] == (device.dispatch_key, device.kernels)
    assert importlib.util.find_spec(device.kernels) is not None
    assert device.targets and all(t.device == name and TARGETS[t.name] is t for t in device.targets)


def test_operators_find_their_kernels_whatever_was_imported_first() -> None:
    program = "from bi_compile.ops import KERNELS; print(*KERNELS)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == list(DEVICES)


def test_a_cpu_without_a_compiler_is_a_target_of_its_own() -> None:
    assert (for_device("cpu", True).name, for_device("cpu", False).name) == ("cpu", "cpu_eager")


def test_an_unknown_device_is_refused_with_what_there_is() -> None:
    with pytest.raises(OptionError, match=r"unknown target 'mps': known are ascend-950, .*cpu, .*cuda"):
        for_device("mps", True)
    with pytest.raises(OptionError, match="unknown target 'mps'"):
        get_target("mps")
