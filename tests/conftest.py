"""Every test runs with strict dtype promotion: nothing is promoted that the code does not promote itself."""

import collections
import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

import eight_devices
import hypothesis
import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache
from memory import resident_bytes

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation makes the first example slow, and CI machines are noisy: no deadline, the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=3000, print_blob=True)
hypothesis.settings.load_profile("house")
# The workers compile thousands of small programs, most of them alike: they share what they compiled.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of live programs cost gigabytes, and make every garbage collection slow."""
    yield
    release_memory()


@pytest.fixture(autouse=True)
def stay_small():
    yield
    if resident_bytes() > 1.6e9:
        release_memory()


@pytest.fixture(scope="module")
def no_tpu_here():
    """Settings for libtpu on a machine without TPU.

    By default libtpu asks the network for the machine type and refuses a second process. Programs for a TPU cannot be
    read back from the cache without a TPU, so the cache is off; jax reads this setting once, hence the reset.
    """
    names = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def release_memory():
    """The C library keeps what the compiler freed, over a gigabyte in a few minutes, unless it is told to return it."""
    jax.clear_caches()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


# Compiling takes nearly all of the time, and most programs run once: without optimisations it takes a tenth of it.
CHEAP = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
}


def cheap_flags():
    """The flags that this version of XLA has: it aborts on any other."""
    flags = []
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
            # A name alone does not do: a library may name, in another string, a flag that it no longer has.
            flags += [
                f"--{name}={value}" for name, value in CHEAP.items() if binary.find(f"\0{name}\0".encode()) >= 0
            ]
    return flags


def pytest_addoption(parser):
    parser.addoption(
        "--optimized", action="store_true", help="compile with all of XLA's optimisations, as users do"
    )
    parser.addoption("--compilations", action="store_true", help="count the programs that each file compiles")


def pytest_configure(config):
    flags = os.environ.get("XLA_FLAGS", "")  # XLA reads them when it compiles for the first time
    if not config.getoption("--optimized") and "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*cheap_flags(), flags])
    eight_devices.markers = config.option.markexpr
    if config.getoption("--compilations"):
        config.pluginmanager.register(Compilations())


class Compilations:
    """Reports for each file: processor seconds, seconds in the compiler, programs compiled, programs read from disk."""

    def __init__(self):
        self.counts = collections.defaultdict(lambda: [0.0, 0.0, 0, 0])
        self.peaks = {}  # bytes by worker
        self.file = "collection"
        jax.monitoring.register_event_duration_secs_listener(self.compiled)
        jax.monitoring.register_event_listener(self.event)

    def compiled(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.counts[self.file][1] += seconds
            self.counts[self.file][2] += 1

    def event(self, event, **_):
        if event == "/jax/compilation_cache/cache_hits":  # jax calls a program that it reads compiled as well
            self.counts[self.file][2] -= 1
            self.counts[self.file][3] += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.file, start = item.location[0], processor_seconds()
        result = yield
        self.counts[self.file][0] += processor_seconds() - start
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        self.peaks[getattr(session.config, "workerinput", {}).get("workerid", "main")] = peak_bytes()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["compilations"] = [dict(self.counts), self.peaks]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        counts, peaks = node.workeroutput["compilations"]
        self.peaks |= peaks
        for file, row in counts.items():
            self.counts[file] = [a + b for a, b in zip(self.counts[file], row, strict=True)]

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("compilations")
        print_row = lambda name, cpu, compiling, programs, read: terminalreporter.write_line(
            f"{cpu:7.1f} s {compiling:7.1f} s compiling {programs:6d} programs {read:6d} read   {name}"
        )
        for file, row in sorted(self.counts.items(), key=lambda each: -each[1][0]):
            print_row(file, *row)
        print_row("all", *map(sum, zip(*self.counts.values(), strict=True)))
        for worker, peak in sorted(self.peaks.items()):
            terminalreporter.write_line(f"{peak / 1e9:5.2f} GB at most in {worker}")


def processor_seconds():
    """Of this process and of the processes that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
