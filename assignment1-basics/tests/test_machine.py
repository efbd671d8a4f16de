"""Cores are those that the process may use, threads are polite, and a driver that is too old is named."""

import os
import subprocess
import sys

import pytest

from cs336_basics import machine
from cs336_basics.machine import available_cpus, check_driver, cuda_version_of_driver, share_cores
from cs336_basics.strategy import resolve_device

QUOTAS = [
    ({}, None),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "400000 100000\n"}, 4),
    ({"cpu.max": "150000 100000\n"}, 2),  # a core and a half
    ({"cpu.max": "10000 100000\n"}, 1),
    ({"cpu.max": "9900000 100000\n"}, None),  # more than there are
    ({"cpu.max": "what is this\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
]


@pytest.mark.parametrize(("files", "expected"), QUOTAS)
def test_cores_of_a_container(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == (expected or 16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cores_of_an_affinity():
    program = "import os; from cs336_basics.machine import available_cpus\n"
    program += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cpus())"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone at the end
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_settings")
def test_threads_sleep_soon(monkeypatch):
    monkeypatch.setattr(machine, "available_cpus", lambda: os.cpu_count())
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == str(machine.SPIN_COUNT)
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.usefixtures("no_settings")
def test_no_more_threads_than_a_container_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(machine, "available_cpus", lambda: 4)
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3"}, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "1"}]
)
def test_what_the_user_has_set_stays(chosen, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    share_cores()
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    assert {name: os.environ[name] for name in names if name in os.environ} == chosen


def test_programs_set_it_before_torch_is_there():
    program = "import sys, cs336_basics.__main__ as program; assert 'torch' not in sys.modules\n"
    program += "import os; sys.argv = ['cs336-basics', '--help']\n"
    program += "try: program.main()\nfinally: print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert printed.splitlines()[-1] == str(machine.SPIN_COUNT)


@pytest.mark.parametrize(
    ("driver", "build", "fits"),
    [
        (None, "13.0", True),
        ((12, 4), None, True),
        ((12, 4), "13.0", False),
        ((12, 4), "12.8", True),  # within a major version older drivers do
        ((13, 0), "13.0", True),
        ((13, 1), "12.8", True),
    ],
)
def test_driver_and_build(driver, build, fits, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "cuda_version_of_driver", lambda: driver)
    if fits:
        check_driver(build)
        return
    with pytest.raises(ValueError, match=r"too old .* built for CUDA 13\.0: it runs CUDA up to 12\.4; .*TORCH="):
        check_driver(build)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_driver(build)


def test_devices_are_checked(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "cuda_version_of_driver", lambda: (1, 2))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(ValueError, match="too old"):
            resolve_device(name)
    assert resolve_device("cpu").type == "cpu"


def test_setup_warns_of_an_old_driver(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(machine, "cuda_version_of_driver", lambda: (13, 0))
    machine.main()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(machine, "cuda_version_of_driver", lambda: (12, 4))
    machine.main()
    printed = capsys.readouterr().err
    assert printed.startswith("warning: the NVIDIA driver")
    assert "TORCH=" in printed
    assert printed.count("\n") == 1


def test_the_driver_of_this_machine():
    version = cuda_version_of_driver()
    assert version is None or version >= (9, 0)
